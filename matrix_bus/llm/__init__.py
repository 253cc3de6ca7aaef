"""Model calls over a live set of OpenAI-compatible endpoints, recorded in the history of the row."""

from ..orchestrator import Usage
from .client import LLM, Model
from .endpoint import Endpoint
from .history import SEGMENT_MARK, Call, full_messages, read_call, read_segment, segment_body, with_segment
from .messages import ChatRequest, Message, Reply, assistant, system, tool, user
from .pool import ModelPool
from .scripted import Responder, ScriptedModels

__all__ = (
    "LLM",
    "SEGMENT_MARK",
    "Call",
    "ChatRequest",
    "Endpoint",
    "Message",
    "Model",
    "ModelPool",
    "Reply",
    "Responder",
    "ScriptedModels",
    "Usage",
    "assistant",
    "full_messages",
    "read_call",
    "read_segment",
    "segment_body",
    "system",
    "tool",
    "user",
    "with_segment",
)
