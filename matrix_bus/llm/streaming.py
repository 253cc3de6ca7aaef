"""A streamed reply: server-sent events, put together to what would have come in one piece."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from msgspec import Struct

from .edge import Choice, Completion, Edge, Said, TokenUsage
from .messages import OnText, Reply

_DONE = b"[DONE]"
MOST_BYTES = 64 << 20
"""A reply that is longer has gone wrong: it would take the worker's memory before its time is up."""


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(Struct):
    index: int = 0
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Piece(Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    index: int = 0
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class _Chunk(Struct):
    choices: list[_Piece] = []
    usage: TokenUsage | None = None
    model: str | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


class _Choice:
    """One choice, as far as it has come."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.tools: dict[int, dict[str, Any]] = {}
        self.finish_reason: str | None = None
        self.logprobs: list[Any] = []

    def add(self, piece: _Piece) -> None:
        delta = piece.delta
        self.text.append(delta.content or "")
        self.reasoning.append(delta.reasoning_content or delta.reasoning or "")
        for part in delta.tool_calls or []:
            call = self.tools.setdefault(part.index, {"id": "", "type": "function", "function": {}})
            call["id"] = part.id or call["id"]
            function = call["function"]
            for key in ("name", "arguments"):
                function[key] = function.get(key, "") + (getattr(part.function, key, None) or "")
        self.finish_reason = piece.finish_reason or self.finish_reason
        if piece.logprobs:
            self.logprobs += piece.logprobs.get("content") or []

    def whole(self) -> Choice:
        said = Said(
            content="".join(self.text),
            reasoning="".join(self.reasoning) or None,
            tool_calls=[self.tools[index] for index in sorted(self.tools)],
        )
        return Choice(said, self.finish_reason, {"content": self.logprobs} if self.logprobs else None)


async def read_stream(edge: Edge, model: str, events: AsyncIterator[bytes], on_text: OnText, started: float) -> Reply:
    """The reply whose `events` are the data of server-sent events; the text of its first choice goes to `on_text`.

    Raises `ReplyInvalid` for what is none, and for a stream that breaks off before its end.
    """
    choices: dict[int, _Choice] = {}
    completion = Completion([])
    first_s = 0.0
    done = False
    size = 0
    last = b""
    async for data in events:
        last = data
        size += len(data)
        if data.strip() == _DONE:
            done = True
        if done:  # read to the end all the same: a connection with something left in it cannot be used again
            continue
        if size > MOST_BYTES:
            raise edge.invalid(model, f"it is longer than {MOST_BYTES >> 20} MiB", data)
        try:
            chunk = _chunk.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise edge.invalid(model, str(error), data) from None
        if chunk.error:
            raise edge.invalid(model, "it broke off with an error", data)
        first_s = first_s or time.perf_counter() - started
        completion.model = chunk.model or completion.model
        completion.usage = chunk.usage or completion.usage
        for piece in chunk.choices:
            choices.setdefault(piece.index, _Choice()).add(piece)
            if piece.index == 0 and piece.delta.content:
                on_text(piece.delta.content)
    completion.choices = [choices[index].whole() for index in sorted(choices)]
    if not done and not any(choice.finish_reason for choice in completion.choices):
        raise edge.invalid(model, "it ended before it was finished", last)
    return edge.reply_of(model, completion, last, time.perf_counter() - started, first_s)


async def events_of(blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events in blocks of bytes that are cut anywhere; data over several lines is joined."""
    left = b""
    data: list[bytes] = []
    async for block in blocks:
        *lines, left = (left + block).split(b"\n")
        if len(left) > MOST_BYTES:
            raise ValueError("a line without end")
        for line in (line.rstrip(b"\r") for line in lines):
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
    if left.startswith(b"data:"):
        data.append(left[5:].strip())
    if data:
        yield b"\n".join(data)
