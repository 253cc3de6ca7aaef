"""Model calls over a live set of OpenAI-compatible endpoints, recorded in the history of the row."""

from ..orchestrator import Usage
from .client import LLM
from .history import Call
from .messages import Message, Reply, assistant, system, tool, user
from .pool import Endpoint, ModelPool

__all__ = (
    "LLM",
    "Call",
    "Endpoint",
    "Message",
    "ModelPool",
    "Reply",
    "Usage",
    "assistant",
    "system",
    "tool",
    "user",
)
