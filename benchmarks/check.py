"""Whether anything got slower than it was: the figures of the benchmarks as ratios, beside those that are kept.

    python -m benchmarks.check            measure, and say what is worse than what is kept by more than the noise
    python -m benchmarks.check --keep     measure three times, and keep that in `benchmarks/kept.json`

Machines differ and are noisy, so nothing is kept in seconds: every figure is divided by another one of the same run
that our code has no part in (the bare loop of `benchmarks.hop`, the openai SDK, an interpreter that imports the same
libraries), or by a figure that it should keep pace with. What is kept is all values that were measured, since their
spread is the noise: a figure is worse if it lies beyond the worst kept value by another tenth of their median.

About three minutes a measurement on two cores. The last line is JSON; the exit code is 1 if something is worse.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

_KEPT = Path(__file__).with_name("kept.json")
_ROOT = Path(__file__).resolve().parent.parent
_MARGIN = 0.1
_TIMES = 3
_IMPORTS = "import asyncio, typer, msgspec"

Better = Literal["higher", "lower"]
FIGURES: dict[str, tuple[Better, str]] = {
    "hop_to_floor": ("higher", "hops per second, over those of the bare loop"),
    "hop_worker_cpu": ("lower", "CPU of the worker per hop, over that of the bare loop"),
    "hop_broker_cpu": ("lower", "CPU of the broker per hop, over that with the bare loop"),
    "hop_latency": ("lower", "a hop on an idle system, over a publish and its confirmation"),
    "llm_hop_cpu": ("lower", "CPU of the worker per hop with a model call, over that of the bare loop per hop"),
    "llm_to_sdk": ("higher", "CPU of the openai SDK per call, over ours"),
    "help_to_imports": ("lower", "`--help`, over an interpreter that imports typer, asyncio and msgspec"),
}
"""What is compared: which way is better, and what it is."""


class Worse(Struct):
    """A figure that got worse."""

    figure: str
    value: float
    limit: float
    kept: list[float]


def _run(module: str, *words: str) -> dict[str, Any]:
    """The last line of a benchmark. Raises `SystemExit` if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *words], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"benchmarks.{module} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found: dict[str, Any] = msgspec.json.decode(done.stdout.splitlines()[-1])
    return found


def _imports_s() -> float:
    taken = []
    for _ in range(6):
        at = time.perf_counter()
        subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
        taken.append(time.perf_counter() - at)
    return statistics.median(taken)


def measure() -> dict[str, float]:
    """All figures, once."""
    hop = _run("hop")
    llm_hop = _run("llm_hop", "--rows", "1000")
    latency = _run("latency")
    llm = _run("llm", "--calls", "3000")
    startup = _run("startup")
    found = {
        "hop_to_floor": hop["ratio_to_floor"],
        "hop_worker_cpu": hop["cpu_us_per_hop_worker"] / hop["cpu_us_per_hop_floor"],
        "hop_broker_cpu": hop["cpu_us_per_hop_broker"] / hop["cpu_us_per_hop_floor_broker"],
        "hop_latency": latency["hop_ms_p50"] / latency["publish_ms_p50"],
        "llm_hop_cpu": llm_hop["cpu_us_per_hop_worker"] / hop["cpu_us_per_hop_floor"],
        "llm_to_sdk": llm["speedup_vs_sdk"],
        "help_to_imports": startup["help_s"] / _imports_s(),
    }
    return {name: round(value, 3) for name, value in found.items()}


def limit(better: Better, kept: Sequence[float]) -> float:
    """The worst value that passes for noise."""
    margin = _MARGIN * statistics.median(kept)
    return round(min(kept) - margin if better == "higher" else max(kept) + margin, 3)


def worse(found: dict[str, float], kept: dict[str, list[float]]) -> list[Worse]:
    """What got worse by more than the noise; a figure that was not kept cannot."""
    result = []
    for name, value in found.items():
        if name not in kept:
            continue
        better, _ = FIGURES[name]
        most = limit(better, kept[name])
        if value < most if better == "higher" else value > most:
            result.append(Worse(name, value, most, kept[name]))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="check", description="Whether anything got slower than it was.")
    parser.add_argument("--keep", action="store_true", help=f"measure {_TIMES} times, and keep that")
    given = parser.parse_args()
    runs = []
    for number in range(_TIMES if given.keep else 1):
        runs.append(measure())
        print(f"measurement {number + 1}: {runs[-1]}", flush=True)
    if given.keep:
        kept = {name: [one[name] for one in runs] for name in FIGURES}
        _KEPT.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")
    elif _KEPT.exists():
        kept = msgspec.json.decode(_KEPT.read_bytes(), type=dict[str, list[float]])
    else:
        parser.error(f"nothing is kept: {_KEPT.name} is missing, make it with --keep")
    problems = worse(runs[-1], kept)
    for problem in problems:
        better, text = FIGURES[problem.figure]
        print(
            f"worse: {problem.figure} is {problem.value:g}, kept {problem.kept}, {better} is better ({text})",
            file=sys.stderr,
        )
    machine = {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)}
    made = {"benchmark": "check", "ok": not problems, "worse": problems, "found": runs[-1], "kept": kept}
    print(msgspec.json.encode({**made, "machine": machine}).decode(), flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
