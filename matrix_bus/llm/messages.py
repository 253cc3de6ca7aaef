"""What goes into a model call and what comes out of it, by the names of OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from msgspec import Struct

from ..config import Sampling
from ..orchestrator import Usage


class Message(Struct, frozen=True, omit_defaults=True):
    """One message of a chat. `content` is a text, a list of typed parts (text, image_url, …) or None."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


def system(text: str) -> Message:
    """A system message."""
    return Message("system", text)


def user(text_or_parts: str | list[dict[str, Any]]) -> Message:
    """A user message: a text, or typed parts such as `{"type": "image_url", "image_url": {"url": …}}`."""
    return Message("user", text_or_parts)


def assistant(text: str | None, tool_calls: list[dict[str, Any]] | None = None) -> Message:
    """A message of the model, with the tool calls that it asked for, if any."""
    return Message("assistant", text, tool_calls=tool_calls)


def tool(text: str, tool_call_id: str) -> Message:
    """The result of the tool call with that id."""
    return Message("tool", text, tool_call_id=tool_call_id)


class Reply(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model answered. Everything but `choices` is that of the first choice."""

    text: str
    """Empty if the model only called tools."""
    finish_reason: str
    """`stop`, `length`, `tool_calls`, … as the server says; empty if it says nothing."""
    model: str
    """The name that the server gives, which may be more exact than the one asked for."""
    endpoint: str
    """URL of the server that answered."""
    usage: Usage = Usage()
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = []
    logprobs: dict[str, Any] | None = None
    choices: list[str] = []
    """The texts of all choices, in the server's order: as many as `extra={"n": …}` asked for, else one."""
    latency_s: float = 0.0
    """From the moment that the call was sent until the reply was read; no time in line."""
    first_s: float = 0.0
    """Until the first piece of a streamed reply; 0 if it was not streamed."""
    cached: bool = False
    """True if it was answered before, and cost nothing now: no tokens, no call."""


class ChatRequest(Struct, frozen=True):
    """One call as every transport takes it. `model` is the server's name for it, not our alias."""

    model: str
    messages: Sequence[Message]
    sampling: Sampling = Sampling()
    session: str = ""
    """The same for all calls of a row, where calls should find the replica that has the row's prefix."""

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        """The body to encode as JSON."""
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return {**sent(self.sampling), "model": self.model, "messages": self.messages, **streaming}


def sent(sampling: Sampling) -> dict[str, Any]:
    """The body parameters that `sampling` stands for: `extra` unfolded, what is unset left out."""
    plain = {name: getattr(sampling, name) for name in sampling.__struct_fields__ if name != "extra"}
    return {**(sampling.extra or {}), **{name: value for name, value in plain.items() if value is not None}}


SESSION_HEADER = "X-Session-ID"
"""For routers in front of replicas: what they may hash to keep a row's calls together."""

OnText = Callable[[str], None]
"""Takes a piece of a streamed text. What it raises ends the call."""


class Transport(Protocol):
    """How one endpoint is called. What goes wrong is raised as a `ModelError`, never as a foreign error."""

    async def complete(self, request: ChatRequest, timeout_s: float, on_text: OnText | None = None) -> Reply:
        """Send one call; `timeout_s` covers all of it, from connecting to the last byte of the reply.

        With `on_text` the reply is streamed, and each piece of its text is given to it as it comes.
        """
        ...

    async def models(self) -> list[str]:
        """The names of the models that the server has."""
        ...

    async def close(self) -> None:
        """Give the connections back; calls in flight fail with `EndpointGone`."""
        ...
