"""How a replica of a model is started with each of the servers that are known here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from matrix_bus.errors import UsageError

from .model import resolve_model, served_name


@dataclass(frozen=True)
class Launch:
    """What starts one replica; `{port}` and `{host}` in its words are filled in."""

    name: str
    """What the model is called by."""
    words: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    model: str
    """A name of the hub, a folder, or a file."""
    name: str = ""
    """What to call it by, if not by `model`."""
    extra: tuple[str, ...] = ()
    """Words that are passed on to the server."""
    gpus: tuple[str, ...] = ()
    """Of this replica; empty: whatever the server finds."""
    python: str = ""
    """Interpreter of the environment that has the server, if not this one."""

    def interpreter(self, package: str) -> str:
        """What runs the server. Raises `UsageError` if it is not installed here, and no other place is named."""
        if not self.python and find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed in this environment: install it, name another with --python, or choose "
                "another --backend"
            )
        return self.python or sys.executable


def vllm(wanted: Wanted) -> Launch:
    """vLLM's own server (its `vllm serve`, as a module: not every build of it has the command)."""
    name = wanted.name or wanted.model
    words = [wanted.interpreter("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", wanted.model]
    words += ["--served-model-name", name, "--host", "{host}", "--port", "{port}"]
    if len(wanted.gpus) > 1:
        words += ["--tensor-parallel-size", str(len(wanted.gpus))]
    return Launch(name, (*words, *wanted.extra), _visible(wanted.gpus))


def sglang(wanted: Wanted) -> Launch:
    """SGLang's server."""
    name = wanted.name or wanted.model
    words = [wanted.interpreter("sglang"), "-m", "sglang.launch_server", "--model-path", wanted.model]
    words += ["--served-model-name", name, "--host", "{host}", "--port", "{port}", "--enable-metrics"]
    if len(wanted.gpus) > 1:
        words += ["--tp", str(len(wanted.gpus))]
    return Launch(name, (*words, *wanted.extra), _visible(wanted.gpus))


def llama(wanted: Wanted) -> Launch:
    """llama.cpp in a process of ours, on the CPU; `model` is a GGUF file, or `embedded`. On loopback alone."""
    path = resolve_model(None if wanted.model == "embedded" else Path(wanted.model))
    name = wanted.name or served_name(path)
    words = [sys.executable, "-m", "matrix_serving.llama", "--model", str(path), "--name", name, "--port", "{port}"]
    return Launch(name, (*words, *wanted.extra), {})


def simulator(wanted: Wanted) -> Launch:
    """No model: answers at the pace of a profile, which is what `extra` begins with."""
    words = [sys.executable, "-m", "matrix_serving.simulator", "--model", wanted.name or wanted.model]
    return Launch(wanted.name or wanted.model, (*words, "--port", "{port}", *wanted.extra), {})


def command(wanted: Wanted) -> Launch:
    """Any OpenAI-compatible server, by its command line; `model` is what it is called by."""
    if not wanted.extra:
        raise UsageError("--backend command needs a command after --: matrix-bus serve NAME … -- server --port {port}")
    return Launch(wanted.name or wanted.model, wanted.extra, _visible(wanted.gpus))


BACKENDS: dict[str, Callable[[Wanted], Launch]] = {
    "vllm": vllm,
    "sglang": sglang,
    "llama": llama,
    "command": command,
    "simulator": simulator,
}


def _visible(gpus: Sequence[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}


def shares_of_gpus(given: str, replicas: int, per_replica: int) -> list[tuple[str, ...]]:
    """GPUs for each replica: those named, else those that CUDA_VISIBLE_DEVICES or nvidia-smi shows; none without any.

    Raises `UsageError` if there are too few.
    """
    named = given or os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = _installed() if named is None else [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    if not gpus and per_replica == 1:
        return [()] * replicas
    if len(gpus) < replicas * per_replica:
        raise UsageError(
            f"{replicas} replicas with {per_replica} GPUs each need {replicas * per_replica}, there are {len(gpus)}: "
            f"{', '.join(gpus) or 'none found'}; lower --replicas or --gpus-per-replica, or name others with --gpus"
        )
    return [tuple(gpus[at * per_replica : (at + 1) * per_replica]) for at in range(replicas)]


def _installed() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(n) for n, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")]
