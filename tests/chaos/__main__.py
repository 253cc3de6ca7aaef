"""`python -m tests.chaos --rows 20000 --kills 200 --seed 1`; prints the verdict as one JSON object, last line."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.chaos.harness import Harness, Shape
from tests.chaos.plan import draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=200, help="attacks of all kinds")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same plan")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=300)
    parser.add_argument("--cluster", action="store_true", help="three brokers, every message on all of them")
    parser.add_argument("--folder", type=Path, help="keep everything there; otherwise only after a failure")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    shape = Shape(args.rows, workers=args.workers, in_flight=args.in_flight, cluster=args.cluster)
    verdict = Harness(folder, shape).attack(draw(args.seed, args.kills, cluster=args.cluster))
    verdict.seed, verdict.cluster = args.seed, args.cluster
    if verdict.ok and args.folder is None:
        shutil.rmtree(folder)
    else:
        print(f"everything is kept in {folder}", file=sys.stderr)
    print(msgspec.json.encode(verdict).decode())
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
