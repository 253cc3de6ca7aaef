"""matrix-bus: multi-agent synthetic data generation as rows that travel over NATS JetStream.

Everything public is here; modules below this one are private in all but name. Names load on first use, so that
importing the package costs nothing that is not needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agent import Large, Next, Outcome, Row, State, Workflow, failed, filtered, load_workflow, success, to
    from .catalog import WorkflowInfo
    from .client import (
        BlockingClient,
        BlockingRun,
        Client,
        Rejections,
        Run,
        Status,
        connect,
        connect_blocking,
    )
    from .config import ModelConfig, RoleConfig, RunConfig, Sampling
    from .dataset import Rejected
    from .errors import BusError, MatrixBusError, UsageError
    from .llm import LLM, Message, Reply, assistant, system, tool, user
    from .orchestrator import OutcomeRecord, Usage

_HOMES = {
    "agent": (
        "Large",
        "Next",
        "Outcome",
        "Row",
        "State",
        "Workflow",
        "failed",
        "filtered",
        "load_workflow",
        "success",
        "to",
    ),
    "catalog": ("WorkflowInfo",),
    "client": (
        "BlockingClient",
        "BlockingRun",
        "Client",
        "Rejections",
        "Run",
        "Status",
        "connect",
        "connect_blocking",
    ),
    "config": ("ModelConfig", "RoleConfig", "RunConfig", "Sampling"),
    "dataset": ("Rejected",),
    "errors": ("BusError", "MatrixBusError", "UsageError"),
    "llm": ("LLM", "Message", "Reply", "assistant", "system", "tool", "user"),
    "orchestrator": ("OutcomeRecord", "Usage"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"

__all__ = (
    "LLM",
    "BlockingClient",
    "BlockingRun",
    "BusError",
    "Client",
    "Large",
    "MatrixBusError",
    "Message",
    "ModelConfig",
    "Next",
    "Outcome",
    "OutcomeRecord",
    "Rejected",
    "Rejections",
    "Reply",
    "RoleConfig",
    "Row",
    "Run",
    "RunConfig",
    "Sampling",
    "State",
    "Status",
    "Usage",
    "UsageError",
    "Workflow",
    "WorkflowInfo",
    "__version__",
    "assistant",
    "connect",
    "connect_blocking",
    "failed",
    "filtered",
    "load_workflow",
    "success",
    "system",
    "to",
    "tool",
    "user",
)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
