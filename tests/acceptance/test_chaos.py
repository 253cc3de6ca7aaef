"""The chaos harness, short; and that it notices when a promise is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.harness import Harness, Shape
from tests.chaos.plan import ACK_WAIT_S, Strike, draw

pytestmark = pytest.mark.timeout(180)


def test_a_seed_makes_one_plan() -> None:
    plan = draw(7, 50)
    assert plan == draw(7, 50) != draw(8, 50)
    assert [strike.at for strike in plan] == sorted(strike.at for strike in plan)
    assert {strike.action for strike in draw(7, 400, cluster=True)} > {strike.action for strike in draw(7, 400)}


def test_nothing_is_lost_and_nothing_comes_twice(tmp_path: Path) -> None:
    verdict = Harness(tmp_path / "chaos", Shape(800, in_flight=200)).attack(draw(11, 12))
    assert verdict.ok, verdict
    assert verdict.kills >= 8
    assert verdict.repeated_calls > 0, "workers were killed with rows in them"


def frozen(*shares: float) -> list[Strike]:
    return [Strike(n, "freeze worker", at, 0.0, 1.6 * ACK_WAIT_S) for n, at in enumerate(shares)]


def killed(*shares: float) -> list[Strike]:
    return [Strike(n, "kill worker", at, 0.0, 0.0) for n, at in enumerate(shares)]


@pytest.mark.parametrize(
    ("sabotage", "plan", "fault"),
    [
        ("no fence", frozen(0.1, 0.5), "forks"),
        ("no guard", frozen(0.9, 0.95), "duplicated"),
        ("ack before publish", killed(0.9, 0.92, 0.94, 0.96), "lost"),
    ],
)
def test_a_broken_promise_is_noticed(tmp_path: Path, sabotage: str, plan: list[Strike], fault: str) -> None:
    shape = Shape(120, workers=2, in_flight=120, seconds=0.4, sabotage=sabotage, stalled_after_s=10)
    verdict = Harness(tmp_path / "chaos", shape).attack(plan)
    assert getattr(verdict, fault) > 0, verdict
    assert not verdict.ok
