"""One measurement of one system: its driver as a process over fresh endpoints, checked and put into figures."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from . import pages, world
from .pages import Lengths
from .world import Endpoints

System = Literal["ours", "ray_data", "semaphore"]
RAY = ("ray[data]==2.51.1", "pyarrow==26.0.1", "pandas==3.1.1", "aiohttp==3.14.5")


class World(Struct):
    """What all systems meet: pages, lengths of answers, endpoints."""

    rows: int
    seed: int = 1
    endpoints: Endpoints = Endpoints()
    lengths: Lengths = Lengths()


class Measured(Struct, omit_defaults=True):
    """One measurement."""

    system: System
    config: dict[str, Any]
    seconds: float
    rows_per_s: float
    tokens_per_s: float
    """Prompt and generated tokens, as the endpoints counted them."""
    utilisation: float
    """The share of the endpoints' batch slots in use, on average."""
    utilisation_over_time: list[float]
    cpu_s: float
    """Of all processes of the driver, broker or Ray's own included, without their start."""
    memory_mb: int
    processes: int
    problems: list[str] = []


class Bench:
    """Measures; `ray_env` is the folder of Ray's virtual environment."""

    def __init__(self, ray_env: Path, timeout_s: float) -> None:
        self._ray_env = ray_env
        self._timeout_s = timeout_s

    def prepare(self) -> None:
        """Makes Ray's environment if it is not there: about 600 MB."""
        python = self._ray_env / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(self._ray_env)], check=True)
        if subprocess.run([python, "-c", "import ray.data, aiohttp"], check=False, capture_output=True).returncode:
            subprocess.run([python, "-m", "pip", "install", "-q", *RAY], check=True)

    def measure(self, system: System, config: dict[str, Any], given: World) -> Measured:
        """Raises `SystemExit` if the driver fails or takes too long."""
        # Ray's sockets lie in the folder, and their paths must stay short.
        with tempfile.TemporaryDirectory(prefix="mbc-") as folder:
            file = Path(folder) / "pages.jsonl"
            pages.write(file, given.rows, given.seed)
            with world.serving(given.endpoints, given.lengths) as urls:
                python = self._ray_env.absolute() / "bin" / "python" if system == "ray_data" else sys.executable
                told = {**config, "pages": str(file), "urls": urls, "temp": f"{folder}/t"}
                words = [str(python), "-m", f"benchmarks.curation.{system}", json.dumps(told)]
                found, seen = asyncio.run(
                    world.watched(words, urls, given.endpoints.all_slots, self._timeout_s, Path(folder) / "log")
                )
        began, ended = found["began"], found["ended"]
        seconds = ended - began
        wanted = pages.expected(given.rows, given.seed)
        measured = Measured(
            system,
            config,
            round(seconds, 2),
            round(given.rows / seconds, 1),
            round(seen.all_tokens() / seconds),
            seen.utilisation(began, ended),
            seen.series(began, ended),
            seen.cpu_s(began, ended),
            int(seen.memory_mb),
            seen.processes,
        )
        for end in sorted(wanted.keys() | found["ends"].keys()):
            if (is_ := found["ends"].get(end, 0)) != (should := wanted.get(end, 0)):
                measured.problems.append(f"{system}: {end}: {is_} pages, {should} expected")
        print(
            f"{system:9} {measured.seconds:7.1f} s {measured.rows_per_s:7.1f} rows/s {measured.tokens_per_s:8.0f} "
            f"tokens/s {measured.utilisation:6.1%} of slots {measured.cpu_s:6.1f} CPU-s {measured.memory_mb:5} MB  "
            f"{json.dumps(config)}",
            flush=True,
        )
        return measured
