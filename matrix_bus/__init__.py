"""matrix-bus: multi-agent synthetic data generation as rows that travel over NATS JetStream.

Everything public is here; modules below this one are private in all but name. Names load on first use, so that
importing the package costs nothing that is not needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agent import (
        Large,
        Next,
        Outcome,
        Row,
        RowResult,
        State,
        Workflow,
        failed,
        filtered,
        load_workflow,
        success,
        to,
    )
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
    from .config import LlmConfig, ModelConfig, RoleConfig, RunConfig, Sampling
    from .dataset import Rejected
    from .errors import (
        BusError,
        ContextLengthExceeded,
        EndpointGone,
        HandlerError,
        MatrixBusError,
        ModelError,
        ModelTimeout,
        RateLimited,
        Retry,
        RowError,
        StructureInvalid,
        UsageError,
    )
    from .llm import LLM, ChatRequest, Message, Reply, assistant, system, tool, user
    from .orchestrator import OutcomeRecord, Usage

_HOMES = {
    "agent": (
        "Large",
        "Next",
        "Outcome",
        "Row",
        "RowResult",
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
    "config": ("LlmConfig", "ModelConfig", "RoleConfig", "RunConfig", "Sampling"),
    "dataset": ("Rejected",),
    "errors": (
        "BusError",
        "ContextLengthExceeded",
        "EndpointGone",
        "HandlerError",
        "MatrixBusError",
        "ModelError",
        "ModelTimeout",
        "RateLimited",
        "Retry",
        "RowError",
        "StructureInvalid",
        "UsageError",
    ),
    "llm": ("LLM", "ChatRequest", "Message", "Reply", "assistant", "system", "tool", "user"),
    "orchestrator": ("OutcomeRecord", "Usage"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"

__all__ = (
    "LLM",
    "BlockingClient",
    "BlockingRun",
    "BusError",
    "ChatRequest",
    "Client",
    "ContextLengthExceeded",
    "EndpointGone",
    "HandlerError",
    "Large",
    "LlmConfig",
    "MatrixBusError",
    "Message",
    "ModelConfig",
    "ModelError",
    "ModelTimeout",
    "Next",
    "Outcome",
    "OutcomeRecord",
    "RateLimited",
    "Rejected",
    "Rejections",
    "Reply",
    "Retry",
    "RoleConfig",
    "Row",
    "RowError",
    "RowResult",
    "Run",
    "RunConfig",
    "Sampling",
    "State",
    "Status",
    "StructureInvalid",
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
