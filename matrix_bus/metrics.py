"""What a worker counts, as Prometheus reads it; names in one place."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator

from prometheus_client import REGISTRY, Counter, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

OUTCOMES = Counter("matrix_bus_outcomes", "Rows that ended, by kind", ["workflow", "outcome"])
ADMITTED = Counter("matrix_bus_rows_admitted", "Rows that this process set off", ["workflow"])
DEAD_LETTERS = Counter("matrix_bus_dead_letters", "Messages that could not be read")
LOOP_BLOCKED = Counter("matrix_bus_loop_blocked_seconds", "Time that a handler blocked the event loop", ["role"])
TOKENS = Counter("matrix_bus_tokens", "Tokens of model calls", ["workflow", "role", "direction"])
MODEL_CALLS = Counter("matrix_bus_model_calls", "Model calls", ["workflow", "role"])


_BUCKETS_S = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)


class RoleStats:
    """What the hops of one role did in this process: plain numbers, turned into metrics when somebody asks.

    A counter of the library costs a lock and some microseconds; five of them would be a twentieth of a hop.
    """

    __slots__ = ("buckets", "in_flight", "seconds", "settled")

    def __init__(self) -> None:
        self.settled = {"advance": 0, "retry": 0, "outcome": 0}
        self.in_flight = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(_BUCKETS_S) + 1)

    def observe(self, seconds: float) -> None:
        """A handler call took this long."""
        self.seconds += seconds
        self.buckets[bisect.bisect_left(_BUCKETS_S, seconds)] += 1


_stats: dict[tuple[str, str], RoleStats] = {}


def role_stats(workflow: str, role: str) -> RoleStats:
    """The numbers of a role, the same object for all runs of a workflow."""
    return _stats.setdefault((workflow, role), RoleStats())


class _RoleCollector(Collector):
    def collect(self) -> Iterator[Metric]:
        hops = CounterMetricFamily(
            "matrix_bus_hops", "Handler deliveries by how they settled", labels=["workflow", "role", "settled"]
        )
        in_flight = GaugeMetricFamily(
            "matrix_bus_hops_in_flight", "Hops whose handler is at work in this process", labels=["workflow", "role"]
        )
        seconds = HistogramMetricFamily(
            "matrix_bus_handler_seconds", "Time inside a handler", labels=["workflow", "role"]
        )
        bounds = [*(str(float(bound)) for bound in _BUCKETS_S), "+Inf"]
        for labels, stats in list(_stats.items()):
            for how, count in stats.settled.items():
                hops.add_metric([*labels, how], count)
            in_flight.add_metric(labels, stats.in_flight)
            counts = itertools.accumulate(stats.buckets)
            seconds.add_metric(labels, list(zip(bounds, map(float, counts), strict=True)), stats.seconds)
        yield from (hops, in_flight, seconds)


REGISTRY.register(_RoleCollector())


def serve_metrics(port: int) -> None:
    """Serves /metrics on loopback."""
    start_http_server(port, addr="127.0.0.1", registry=REGISTRY)
