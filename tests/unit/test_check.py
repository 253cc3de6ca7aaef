"""The regression guard: what counts as worse."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks import check
from benchmarks.check import FIGURES, limit, worse


def test_the_spread_of_what_is_kept_is_noise() -> None:
    assert limit("higher", [0.8, 0.7, 0.9]) == pytest.approx(0.62)
    assert limit("lower", [1.0, 1.2, 1.1]) == pytest.approx(1.31)


@pytest.mark.parametrize(
    ("value", "found"), [(0.9, False), (0.63, False), (0.61, True)], ids=["better", "within the noise", "worse"]
)
def test_a_figure_that_fell_is_worse(value: float, found: bool) -> None:
    kept = {"hop_to_floor": [0.8, 0.7, 0.9]}
    assert bool(worse({"hop_to_floor": value}, kept)) is found


@pytest.mark.parametrize(("value", "found"), [(0.5, False), (1.3, False), (1.32, True)])
def test_a_cost_that_rose_is_worse(value: float, found: bool) -> None:
    kept = {"hop_worker_cpu": [1.0, 1.2, 1.1]}
    assert bool(worse({"hop_worker_cpu": value, "llm_to_sdk": 0.1}, kept)) is found


def test_every_figure_is_kept() -> None:
    kept = msgspec.json.decode(check._KEPT.read_bytes(), type=dict[str, list[float]])
    assert kept.keys() == FIGURES.keys()
    assert all(len(values) == check._TIMES and min(values) > 0 for values in kept.values())
