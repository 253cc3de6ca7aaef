"""The curation of web pages (arXiv 2511.21686, section 5.2) by matrix-bus, Ray Data and plain asyncio.

    python -m benchmarks.curation [--rows 6000] [--sweep-rows 2500] [--repeat 2] [--ray-env .ray]
    python -m benchmarks.curation --sweep-ours

All systems curate the same made-up pages with the same prompts over the same simulated endpoints; see
docs/curation-benchmark.md. Ray runs from an environment of its own, made on first use. A system of which the pages
do not end as the simulated model decides them ends the benchmark with exit code 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec

from .measure import RAY, Bench, Measured, System, World
from .pages import Lengths
from .world import Endpoints


def ray_configs(slots: int) -> list[dict[str, Any]]:
    """What is tried of Ray Data: rows of a batch, batches under way in an actor, and actors, for each stage.

    First the usual way, where an actor awaits its batch before it takes the next; then several batches at a time;
    then batches of one row, with which no row waits for another.
    """
    some = max(1, slots // 16)
    return [
        {"batch": [64, 16, 16], "batches": [1, 1, 1], "actors": [2, 2, max(1, some // 2)]},
        {"batch": [64, 16, 16], "batches": [1, 1, 1], "actors": [2, 2, some]},
        {"batch": [64, 64, 64], "batches": [1, 1, 1], "actors": [2, 2, max(2, some // 2)]},
        {"batch": [64, 64, 64], "batches": [1, 1, 1], "actors": [4, 4, max(4, some)]},
        {"batch": [64, 16, 16], "batches": [4, 4, 2 * some], "actors": [1, 1, 1]},
        {"batch": [64, 4, 1], "batches": [8, 32, 2 * slots], "actors": [1, 1, 1]},
        {"batch": [16, 1, 1], "batches": [16, slots, 2 * slots], "actors": [1, 1, 1]},
    ]


def our_config(slots: int) -> dict[str, Any]:
    """What matrix-bus is measured with: twice the rows in flight that the endpoints have slots, one worker."""
    return {"in_flight": 2 * slots, "slots": 2 * slots, "procs": 1, "shards": 1}


def our_sweep(slots: int) -> list[dict[str, Any]]:
    """Rows in flight, then worker processes, their slots, and shards, from the same middle."""
    middle = our_config(slots)
    return [
        *({**middle, "in_flight": n, "slots": n} for n in (slots // 2, slots, 2 * slots, 4 * slots)),
        *({**middle, "procs": n, "slots": 2 * slots // n} for n in (2, 4)),
        *({**middle, "slots": n} for n in (slots // 4, slots // 2)),
        *({**middle, "shards": n} for n in (2, 4)),
    ]


def fastest(found: list[Measured]) -> Measured:
    return max(found, key=lambda one: one.tokens_per_s)


def is_batchwise(config: dict[str, Any]) -> bool:
    """Whether an actor awaits its batch before it takes the next."""
    batches: list[int] = config["batches"]
    return max(batches) == 1


def compare(bench: Bench, given: World, sweep_rows: int, repeat: int) -> tuple[list[Measured], dict[str, Any]]:
    """Everything measured, and the report."""
    slots = given.endpoints.all_slots
    small = msgspec.structs.replace(given, rows=sweep_rows)
    ray_tried, plain_tried = ray_configs(slots), [{"in_flight": n} for n in (2 * slots, slots, 4 * slots)]
    ray = [bench.measure("ray_data", config, small) for config in ray_tried if sweep_rows]
    plain = [bench.measure("semaphore", config, small) for config in plain_tried if sweep_rows]
    batchwise_tried = [one for one in ray if is_batchwise(one.config)]
    sides: dict[str, tuple[System, dict[str, Any]]] = {
        "matrix_bus": ("ours", our_config(slots)),
        "ray_data": ("ray_data", fastest(ray).config if ray else ray_tried[-1]),
        "ray_data_batchwise": ("ray_data", fastest(batchwise_tried).config if ray else ray_tried[3]),
        "semaphore": ("semaphore", fastest(plain).config if plain else plain_tried[0]),
    }
    if sides["ray_data"] == sides["ray_data_batchwise"]:
        del sides["ray_data_batchwise"]
    full: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, (system, config) in sides.items():
            full[name].append(bench.measure(system, config, given))
    tokens_per_s = {name: statistics.median(one.tokens_per_s for one in some) for name, some in full.items()}
    ours = tokens_per_s["matrix_bus"]
    batchwise = tokens_per_s.get("ray_data_batchwise", tokens_per_s["ray_data"])
    report = {
        "ratio": round(ours / tokens_per_s["ray_data"], 3),
        "ratio_to_ray_data_batchwise": round(ours / batchwise, 3),
        "ratio_to_semaphore": round(ours / tokens_per_s["semaphore"], 3),
        "systems": {name: _summary(some) for name, some in full.items()},
        "sweep_rows": sweep_rows,
        "sweep_ray_data": [_short(one) for one in ray],
        "sweep_semaphore": [_short(one) for one in plain],
    }
    return [*ray, *plain, *(one for some in full.values() for one in some)], report


def _summary(found: list[Measured]) -> dict[str, Any]:
    """Medians, and each run beside them."""

    def median(field: str) -> float:
        return round(float(statistics.median(getattr(one, field) for one in found)), 3)

    names = ("seconds", "rows_per_s", "tokens_per_s", "utilisation", "cpu_s", "memory_mb", "processes")
    return {
        "config": found[0].config,
        **{name: median(name) for name in names},
        "seconds_runs": [one.seconds for one in found],
        "utilisation_over_time": found[-1].utilisation_over_time,
    }


def _short(one: Measured) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(one)
    return {name: plain[name] for name in ("config", "seconds", "rows_per_s", "utilisation", "cpu_s", "memory_mb")}


_SWEEP_HELP = (
    "pages of the runs that look for the best settings; 0: take those that were the best on the author's machine"
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="curation", description="Three systems over the same simulated endpoints.")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--sweep-rows", type=int, default=2500, help=_SWEEP_HELP)
    parser.add_argument("--repeat", type=int, default=2, help="full runs of each system, in turns")
    parser.add_argument("--seed", type=int, default=1, help="of the pages")
    parser.add_argument("--endpoints", type=int, default=4)
    parser.add_argument("--slots", type=int, default=32, help="sequences in the batch of each endpoint")
    parser.add_argument("--step-s", type=float, default=0.004, help="of an endpoint, for one token of each sequence")
    parser.add_argument("--question-tokens", type=float, default=600.0, help="median; at most 4096 are said")
    parser.add_argument("--question-sigma", type=float, default=1.0, help="of the logarithm of these tokens")
    parser.add_argument("--sweep-ours", action="store_true", help="instead: matrix-bus alone, in several settings")
    parser.add_argument("--ray-env", type=Path, default=Path(".ray"), help="Ray's virtual environment")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of one measurement")
    args = parser.parse_args()
    given = World(
        args.rows,
        args.seed,
        Endpoints(args.endpoints, args.slots, args.step_s),
        Lengths(question_median=args.question_tokens, question_sigma=args.question_sigma),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    bench = Bench(args.ray_env, args.timeout_s)
    if args.sweep_ours:
        found = [bench.measure("ours", config, given) for config in our_sweep(given.endpoints.all_slots)]
        report: dict[str, Any] = {"sweep_ours": [_short(one) for one in found]}
    else:
        bench.prepare()
        found, report = compare(bench, given, args.sweep_rows, args.repeat)
    problems = [problem for one in found for problem in one.problems]
    for problem in problems[:20]:
        print(problem, file=sys.stderr)
    told = {
        "benchmark": "curation",
        "rows": args.rows,
        **report,
        "ok": not problems,
        "simulated": {
            "endpoints": given.endpoints.count,
            "profile": given.endpoints.profile(),
            "lengths": msgspec.to_builtins(given.lengths),
        },
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "ray": RAY[0],
            "load_1m": round(os.getloadavg()[0], 2),
        },
    }
    print(msgspec.json.encode(told).decode(), flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
