"""Logs: events with fields.

In processes of our own (`configure_logs`) logs go to stderr through structlog, quiet by default. Embedded in a host
they are records of the standard library's loggers `matrix_bus.<part>`, seen where the host attaches a handler, and
structlog is not even imported. What is logged while a hop is being handled carries run, row, hop and role.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import sys
from typing import Any

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
            if level < _own.level:
                return
            _own.logger.log(level, event, **fields, **({"exc_info": True} if exc_info else {}))
        elif self._host.isEnabledFor(level):
            text = " ".join([event, *(f"{name}={value!r}" for name, value in fields.items())])
            extra = {"matrix_bus": {"event": event, **fields}}
            self._host.log(level, "%s", text, exc_info=exc_info, extra=extra, stacklevel=3)


class _Own:
    """structlog, in a process of our own; imported when there is something to say."""

    def __init__(self, level: str, json: bool) -> None:
        self.level: int = getattr(logging, level.upper())
        self._json = json

    @functools.cached_property
    def logger(self) -> Any:
        import structlog

        renderer: Any = (
            structlog.processors.JSONRenderer()
            if self._json
            else structlog.dev.ConsoleRenderer(
                colors=False,
                exception_formatter=structlog.dev.plain_traceback,  # the other one prints locals: rows, keys
            )
        )
        processors: list[Any] = [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if self._json else "%H:%M:%S", utc=self._json),
        ]
        if self._json:
            processors.append(structlog.processors.format_exc_info)
        structlog.configure(
            processors=[*processors, renderer],
            wrapper_class=structlog.make_filtering_bound_logger(self.level),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            cache_logger_on_first_use=False,
        )
        return structlog.get_logger()


_own: _Own | None = None

# Without it the library's last resort would print warnings to the host's stderr.
logging.getLogger("matrix_bus").addHandler(logging.NullHandler())


def logger(name: str) -> Logger:
    """The logger of a part of matrix-bus."""
    return Logger(f"matrix_bus.{name}")


def configure_logs(*, level: str = "warning", json: bool = False) -> None:
    """Sets up logging of a matrix-bus process: lines for people, or one JSON object a line."""
    global _own  # noqa: PLW0603 - a process is ours or it is not
    _own = _Own(level, json)
    # The client library reports lost connections as errors with tracebacks; the bus reports them itself.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
