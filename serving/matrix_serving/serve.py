"""A model server in the foreground, as `matrix-bus serve` runs it."""

from __future__ import annotations

from pathlib import Path

from matrix_bus.errors import UsageError

from . import llama
from .model import resolve_model, served_name

BACKENDS = ("llama",)


def serve(
    backend: str = "llama",
    *,
    port: int = 0,
    parallel: int = llama.PARALLEL,
    context_tokens: int = llama.CONTEXT_TOKENS,
    model: str | Path | None = None,
) -> None:
    """Serve a model on loopback until SIGINT or SIGTERM; prints one line on stdout when it answers.

    `model` is a GGUF file, by default the embedded one. Ends the process. Raises `UsageError` for an unknown
    backend, what `resolve_model` raises, and if the server does not start.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}: there is {', '.join(BACKENDS)}")
    if parallel < 1 or context_tokens < 1 or not 0 <= port <= 65_535:
        raise UsageError(f"port={port} parallel={parallel} context_tokens={context_tokens}: out of range")
    path = resolve_model(model)
    name = served_name(path)

    def ready(url: str) -> None:
        print(f"serving {name} at {url} (use it with llm.urls={url})", flush=True)

    llama.run(path, name, ready=ready, port=port, parallel=parallel, context_tokens=context_tokens)
