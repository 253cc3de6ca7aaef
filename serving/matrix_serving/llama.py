"""The llama.cpp server of xllamacpp in this process, OpenAI-compatible: `python -m matrix_serving.llama`.

Answers `/health`, `/v1/models` and `/v1/chat/completions`. Calls beyond `parallel` wait in line.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from matrix_bus.errors import MatrixBusError, UsageError

PARALLEL = 8
"""Calls decoded at a time. Two cores make 100 tokens/s of one call and 190 of eight; more gain little."""

CONTEXT_TOKENS = 2048
"""Of one call, prompt and answer together; 46 MB of memory for each of the parallel calls."""

# llama.cpp keeps up to 8 GiB of old prompts in memory by default: too much for a server that nobody watches.
_PROMPT_CACHE_MIB = 256


def run(
    model: Path,
    name: str,
    *,
    ready: Callable[[str], None],
    port: int = 0,
    parallel: int = PARALLEL,
    context_tokens: int = CONTEXT_TOKENS,
    threads: int | None = None,
    tag: str = "",
) -> None:
    """Serve `model` as `name` on loopback until SIGINT or SIGTERM; call from the main thread.

    `ready` gets the base URL, with `/v1`, once it answers. `port` 0 is a free one; `context_tokens` is the
    room for one call, prompt and answer together; `tag` is shown in `/v1/models`. The signal cuts off
    the calls under way and ends the process. Raises `UsageError` without xllamacpp or if it does not start.
    """
    try:
        from xllamacpp import CommonParams, Server
    except ImportError as error:
        raise UsageError(
            f"the local model server needs xllamacpp ({error}): pip install 'matrix-bus[local]', or name a "
            f"server of your own with llm.urls=URL"
        ) from None
    # Loading is one native call: until it is back, let the kernel end the process at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    params = CommonParams()
    params.model.path = str(model)
    params.model_alias = {name}
    params.model_tags = {tag} if tag else set()
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = parallel
    params.n_ctx = parallel * context_tokens
    params.cpuparams.n_threads = threads or _cores()
    params.cache_ram_mib = _PROMPT_CACHE_MIB
    params.verbosity = 1  # errors
    params.ui = False
    params.cors_origins = "localhost"  # no web page may use it
    try:
        server = Server(params)
    except RuntimeError:  # the reason was logged to stderr by the native code
        raise UsageError(
            f"the model server did not start: is port {port} taken, or {model} no model that llama.cpp reads?"
        ) from None
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    ready(f"{server.listening_address}/v1")
    stop.wait()
    sys.stdout.flush()
    # The server's destructor waits for ever for calls that are under way, and there is no state to save.
    os._exit(0)


def _cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of one server process; prints its URL when it answers."""
    parser = argparse.ArgumentParser(prog="python -m matrix_serving.llama", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--name", required=True, help="the name to serve it by")
    parser.add_argument("--port", type=int, default=0, help="on loopback; 0: a free one")
    parser.add_argument("--parallel", type=int, default=PARALLEL, help="calls decoded at a time")
    parser.add_argument("--ctx", type=int, default=CONTEXT_TOKENS, help="tokens of one call, prompt and answer")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--tag", default="", help="shown in /v1/models, to tell servers apart")
    args = parser.parse_args(argv)
    try:
        run(
            args.model,
            args.name,
            ready=lambda url: print(url, flush=True),
            port=args.port,
            parallel=args.parallel,
            context_tokens=args.ctx,
            threads=args.threads,
            tag=args.tag,
        )
    except MatrixBusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
