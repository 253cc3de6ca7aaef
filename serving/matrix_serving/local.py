"""The user's shared model server: the embedded model, started by whoever calls it first."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from matrix_bus.errors import UsageError
from matrix_bus.service import LocalService, state_dir

from .model import resolve_model, served_name

# A proxy from the environment must not see, or answer, a call to loopback.
_opener = build_opener(ProxyHandler({}))


def local_model(home: Path | None = None) -> LocalService:
    """The user's shared model server, in `home` (default: the state directory).

    `.ensure()` starts or finds it; the URL ends in `/v1`. It fetches the model where needed (98 MB, once).
    Raises `UsageError` if that fails, without xllamacpp, or with the end of its log if it does not come up.
    """

    def argv(port: int, identity: str) -> list[str]:
        if importlib.util.find_spec("xllamacpp") is None:
            raise UsageError(
                "the embedded model needs xllamacpp: pip install 'matrix-bus[local]', or name a model server "
                "with llm.urls=URL"
            )
        model = resolve_model()
        command = [sys.executable, "-m", "matrix_serving.llama", "--port", str(port), "--tag", identity]
        return [*command, "--model", str(model), "--name", served_name(model)]

    return LocalService(
        "model",
        argv=argv,
        url=lambda port: f"http://127.0.0.1:{port}/v1",
        healthy=_is_server,
        home=home or state_dir(),
    )


def models_at(url: str, timeout_s: float = 2.0) -> list[dict[str, Any]]:
    """What an OpenAI-compatible server at `url` (with `/v1`) lists under `/models`; empty if none answers."""
    try:
        with _opener.open(f"{url}/models", timeout=timeout_s) as reply:
            data = json.load(reply)["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []


def _is_server(url: str, identity: str) -> bool:
    return any(identity in (model.get("tags") or ()) for model in models_at(url))
