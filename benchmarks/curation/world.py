"""The simulated endpoints, and what is seen of them and of a driver's processes while it works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
from msgspec import Struct

from .pages import Lengths
from .stages import MODEL

ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_S = 0.5
_POINTS = 20


class Endpoints(Struct, frozen=True):
    """So many servers of one made-up kind."""

    count: int = 4
    slots: int = 32
    """Sequences in the batch of each."""
    base_s: float = 0.004
    per_seq_s: float = 0.00003
    prefill_tokens_per_s: float = 200_000.0

    @property
    def all_slots(self) -> int:
        return self.count * self.slots

    def profile(self) -> dict[str, Any]:
        """As the simulator reads it."""
        return {
            "name": "curation",
            "source": "assumed: round numbers for which two CPU cores carry all drivers; no hardware was measured",
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "base_s": self.base_s,
            "per_seq_s": self.per_seq_s,
            "max_num_seqs": self.slots,
            "max_model_len": 16_384,
            "kv_cache_tokens": self.slots * 16_384,
            "max_num_batched_tokens": 2048,
            "prefix_caching": False,
        }


@contextlib.contextmanager
def serving(endpoints: Endpoints, lengths: Lengths) -> Iterator[list[str]]:
    """The base URLs of the endpoints, which live for the time of the block."""
    started: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="matrix-bus-curation-") as folder:
        profile = Path(folder) / "profile.json"
        profile.write_bytes(msgspec.json.encode(endpoints.profile()))
        words = ["-m", "matrix_serving.simulator", "--profile", str(profile), "--model", MODEL]
        words += ["--responder", "script:benchmarks.curation.pages:respond"]
        environ = {**os.environ, **lengths.environ()}
        try:
            for _ in range(endpoints.count):
                server = subprocess.Popen(
                    [sys.executable, *words], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
                )
                started.append(server)
            urls = []
            for server in started:
                assert server.stdout is not None
                urls.append(server.stdout.readline().strip())
            if not all(urls):
                raise SystemExit("a simulated endpoint did not start")
            yield urls
        finally:
            for server in started:
                server.terminate()
            for server in started:
                server.wait()


class Seen(Struct):
    """Samples of one measurement, by Unix time."""

    slots: int
    running: list[tuple[float, float]] = msgspec.field(default_factory=list)
    """Sequences in all batches together."""
    tokens: list[tuple[float, float]] = msgspec.field(default_factory=list)
    """Prompt and generated tokens so far, of all endpoints."""
    cpu: list[tuple[float, float]] = msgspec.field(default_factory=list)
    """CPU seconds so far, of the driver's processes together."""
    cpu_of: dict[int, float] = msgspec.field(default_factory=dict)
    """Of each of them, when it was last seen."""
    memory_mb: float = 0.0
    """The most that these processes held at a time: what is their own, and their part of what they share."""
    processes: int = 0

    def utilisation(self, began: float, ended: float) -> float:
        """The share of slots in use, on average."""
        return round(statistics.mean(self._within(began, ended)) / self.slots, 3)

    def series(self, began: float, ended: float) -> list[float]:
        """The same over time, as some points."""
        found = self._within(began, ended)
        size = max(1, -(-len(found) // _POINTS))
        parts = [found[at : at + size] for at in range(0, len(found), size)]
        return [round(statistics.mean(part) / self.slots, 2) for part in parts]

    def all_tokens(self) -> float:
        return self.tokens[-1][1] - self.tokens[0][1]

    def cpu_s(self, began: float, ended: float) -> float:
        """CPU seconds of the driver's processes within that time, to a sample's precision."""
        used = [cpu_s for at, cpu_s in self.cpu if began - 2 * _SAMPLE_S <= at <= ended + _SAMPLE_S]
        return round(used[-1] - used[0], 1) if used else 0.0

    def _within(self, began: float, ended: float) -> list[float]:
        return [running for at, running in self.running if began <= at <= ended] or [0.0]


async def watched(words: list[str], urls: list[str], slots: int, timeout_s: float, log: Path) -> tuple[Any, Seen]:
    """What a driver printed as its result, and what was seen meanwhile. Raises `SystemExit` if it fails."""
    seen = Seen(slots)
    async with aiohttp.ClientSession() as http:
        await _look(http, urls, seen)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with log.open("wb") as errors:
            driver = await asyncio.create_subprocess_exec(
                *words, cwd=ROOT, env=environ, stdout=asyncio.subprocess.PIPE, stderr=errors
            )
        watching = asyncio.create_task(_watch(http, urls, driver.pid, seen))
        try:
            async with asyncio.timeout(timeout_s):
                printed, _ = await driver.communicate()
        finally:
            watching.cancel()
            await asyncio.to_thread(_end, driver.pid, list(seen.cpu_of))
        await _look(http, urls, seen)
    if driver.returncode:
        said = await asyncio.to_thread(log.read_text, errors="replace")
        raise SystemExit(f"{' '.join(words[1:3])} failed:\n{said[-3000:]}")
    # Ray may say something after it.
    return msgspec.json.decode([line for line in printed.splitlines() if line.startswith(b'{"began"')][-1]), seen


async def _watch(http: aiohttp.ClientSession, urls: list[str], pid: int, seen: Seen) -> None:
    due = time.monotonic()
    count = 0
    while True:
        await _look(http, urls, seen)
        _account(pid, seen, memory=count % 10 == 0)
        count += 1
        due += _SAMPLE_S
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _look(http: aiohttp.ClientSession, urls: list[str], seen: Seen) -> None:
    running = tokens = 0.0
    for url in urls:
        async with http.get(url.removesuffix("/v1") + "/metrics") as response:
            for line in (await response.text()).splitlines():
                name, _, value = line.rpartition(" ")
                if name.startswith("vllm:num_requests_running{"):
                    running += float(value)
                elif name.startswith(("vllm:prompt_tokens_total{", "vllm:generation_tokens_total{")):
                    tokens += float(value)
    now = time.time()
    seen.running.append((now, running))
    seen.tokens.append((now, tokens))


def _account(pid: int, seen: Seen, *, memory: bool) -> None:
    bytes_, found = 0, 0
    with contextlib.suppress(psutil.NoSuchProcess):
        driver = psutil.Process(pid)
        for process in [driver, *driver.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                times = process.cpu_times()
                seen.cpu_of[process.pid] = times.user + times.system
                found += 1
                if memory:
                    bytes_ += getattr(process.memory_full_info(), "pss", 0)
    seen.cpu.append((time.time(), sum(seen.cpu_of.values())))
    seen.processes = max(seen.processes, found)
    seen.memory_mb = max(seen.memory_mb, round(bytes_ / 1e6))


def _end(pid: int, others: list[int]) -> None:
    """Kills what a driver left behind: only processes that were seen as its own."""
    for one in [pid, *others]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(one)
            if process.create_time() > psutil.Process().create_time():
                process.kill()
