"""Model calls over a live set of OpenAI-compatible endpoints, recorded in the history of the row."""

from ..orchestrator import Usage
from .client import LLM
from .history import SEGMENT_MARK, Call, read_segment, segment_body, with_segment
from .messages import Message, Reply, assistant, system, tool, user
from .pool import Endpoint, ModelPool

__all__ = (
    "LLM",
    "SEGMENT_MARK",
    "Call",
    "Endpoint",
    "Message",
    "ModelPool",
    "Reply",
    "Usage",
    "assistant",
    "read_segment",
    "segment_body",
    "system",
    "tool",
    "user",
    "with_segment",
)
