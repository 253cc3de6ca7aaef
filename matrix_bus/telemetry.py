"""Names of logs and metrics, in one place.

In processes of our own (`configure_logs`) logs go to stderr through structlog, quiet by default. Embedded in a host
they are records of the standard library's loggers `matrix_bus.<part>`, seen where the host attaches a handler, and
structlog is not even imported. What is logged while a hop is being handled carries run, row, hop and role.
"""

from __future__ import annotations

import bisect
import contextvars
import itertools
import logging
import sys
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, Counter, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Hop = tuple[str, int, int, str]
"""(run, row, hop, role)"""

current_hop: contextvars.ContextVar[Hop | None] = contextvars.ContextVar("matrix_bus_hop", default=None)


class Logger:
    """Events with fields, for whoever listens in this process."""

    def __init__(self, name: str) -> None:
        self._host = logging.getLogger(name)

    def debug(self, event: str, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error, with the exception that is being handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(self, level: int, event: str, fields: dict[str, Any], *, exc_info: bool = False) -> None:
        hop = current_hop.get()
        if hop is not None:
            for name, value in zip(("run", "row", "hop", "role"), hop, strict=True):
                fields.setdefault(name, value)
        if _own is not None:
            _own.log(level, event, **fields, **({"exc_info": True} if exc_info else {}))
        elif self._host.isEnabledFor(level):
            text = " ".join([event, *(f"{name}={value!r}" for name, value in fields.items())])
            extra = {"matrix_bus": {"event": event, **fields}}
            self._host.log(level, "%s", text, exc_info=exc_info, extra=extra, stacklevel=3)


_own: Any = None
"""structlog's logger, in a process of our own."""

# Without it the library's last resort would print warnings to the host's stderr.
logging.getLogger("matrix_bus").addHandler(logging.NullHandler())


def logger(name: str) -> Logger:
    """The logger of a part of matrix-bus."""
    return Logger(f"matrix_bus.{name}")


def configure_logs(*, level: str = "warning", json: bool = False) -> None:
    """Sets up logging of a matrix-bus process: lines for people, or one JSON object a line."""
    import structlog

    global _own  # noqa: PLW0603 - a process is ours or it is not
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(
            colors=False,
            exception_formatter=structlog.dev.plain_traceback,  # the other one prints locals: rows, keys
        )
    )
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if json else "%H:%M:%S", utc=json),
    ]
    if json:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    _own = structlog.get_logger()
    # The client library reports lost connections as errors with tracebacks; the bus reports them itself.
    logging.getLogger("nats").setLevel(logging.CRITICAL)


# --- metrics ----------------------------------------------------------------------------------------------------

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
