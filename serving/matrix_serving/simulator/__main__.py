"""The command line of one simulated server; prints its URL when it answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from matrix_bus.errors import MatrixBusError

from . import PROFILES, load_profile, run
from .failures import Failure
from .server import RETRY_AFTER_S, SLOW_S


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m matrix_serving.simulator", description=__doc__)
    parser.add_argument("--profile", required=True, help=f"{', '.join(PROFILES)}, or a .yaml or .json file")
    parser.add_argument("--model", default="simulated", help="the name to serve; default: simulated")
    parser.add_argument("--port", type=int, default=0, help="on loopback; 0: a free one")
    parser.add_argument("--responder", default="echo", help="echo, fixed:TEXT, recorded:FILE or script:module:function")
    parser.add_argument(
        "--output-tokens",
        default="",
        help="fixed:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA or recorded:FILE; default: the profile's",
    )
    parser.add_argument("--fail", default="", help=f"NAME=RATE,… with {', '.join(Failure)}")
    parser.add_argument("--slow-s", type=float, default=SLOW_S, help="the pause of a slow call, in seconds")
    parser.add_argument("--retry-after-s", type=float, default=RETRY_AFTER_S, help="what a 429 asks for, in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and failures")
    args = parser.parse_args(argv)
    try:
        run(
            load_profile(args.profile),
            args.model,
            ready=lambda url: print(url, flush=True),
            port=args.port,
            answers=args.responder,
            output_tokens=args.output_tokens,
            fail=args.fail,
            slow_s=args.slow_s,
            retry_after_s=args.retry_after_s,
            seed=args.seed,
        )
    except MatrixBusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
