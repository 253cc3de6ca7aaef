"""The record of a row's model calls: one JSON line per call, carried along on the row.

A conversation grows by repeating itself, so a call stores a reference to the role's call before it, and only
the messages after those that both begin with. References are positions in the history: lines may be appended,
or cut off at the end, never removed from the front or the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec
from msgspec import Raw, Struct

from ..errors import RowError
from ..orchestrator import Usage
from .messages import Message


class Failure(Struct, frozen=True):
    """Why a call has no reply: the error's class and its message."""

    type: str
    message: str


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a row's history.

    Fields are only ever added, and with defaults: old and new workers share a row.
    """

    role: str
    model: str
    """The name that the server was asked for."""
    endpoint: str = ""
    """URL of the server that had the call last; empty if it was never sent."""
    sampling: dict[str, Any] = {}
    """The body parameters that were really sent, the derived seed included."""
    prefix: tuple[int, int] | None = None
    """`[index of an earlier call in the history, number of its messages that come before ours]`."""
    messages: list[Message] = []
    """The messages after `prefix`; `full_messages` gives them all."""
    text: str = ""
    finish_reason: str = ""
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = []
    choices: list[str] = []
    """The texts of all choices, if there was more than one."""
    usage: Usage = Usage()
    started_at: float = 0.0
    """Unix time in seconds at which the handler asked."""
    wait_s: float = 0.0
    """Time in line for an endpoint."""
    latency_s: float = 0.0
    """The rest: sending the call, and the server's work on it."""
    hop: int = 0
    attempt: int = 0
    error: Failure | None = None


class _Line(Struct, frozen=True):
    """The little of a line that finding its messages takes; the messages stay bytes."""

    role: str
    prefix: tuple[int, int] | None = None
    messages: list[Raw] = []


_ENCODER = msgspec.json.Encoder()
_CALL = msgspec.json.Decoder(Call)
_LINE = msgspec.json.Decoder(_Line)
_MESSAGE = msgspec.json.Decoder(Message)


def read_call(line: bytes) -> Call:
    """One line of a history; raises `RowError` if it is not one."""
    try:
        return _CALL.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RowError(f"this line of a history cannot be read: {error}: {line[:200]!r}") from None


def full_messages(history: Sequence[bytes], index: int) -> list[Message]:
    """All messages of the call at `index`; raises `RowError` if a line is unreadable or refers forward."""
    try:
        return [_MESSAGE.decode(raw) for raw in _full(history, index)]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RowError(f"line {index} of the history has an unreadable message: {error}") from None


class Recorder:
    """Writes the calls of one role into a history, each in the place that it had when it was started."""

    def __init__(self, history: list[bytes], role: str) -> None:
        self._history = history
        self._role = role
        self._last: tuple[int, list[bytes]] | None = None
        """Position and encoded messages of the role's latest call."""

    def open(self, call: Call) -> tuple[int, Call]:
        """Take the next place for a call that holds all its messages; returns the place and the call to keep.

        Until `close` fills the place it says that the call was never finished, which is then the truth.
        """
        whole = [_ENCODER.encode(message) for message in call.messages]
        last = self._last or self._latest()
        index = len(self._history)
        kept = _common(last[1], whole) if last else 0
        rest = [Raw(message) for message in whole[kept:]]
        call = msgspec.structs.replace(
            call,
            prefix=(last[0], kept) if last and kept else None,
            # Encoded already: Raw goes into the line as it is, where a reader will find messages.
            messages=cast("list[Message]", rest),
        )
        unfinished = Failure("Unfinished", "the handler ended before this call did")
        self._history.append(_ENCODER.encode(msgspec.structs.replace(call, error=unfinished)))
        self._last = index, whole
        return index, call

    def close(self, index: int, call: Call) -> None:
        """Put the finished call in its place."""
        self._history[index] = _ENCODER.encode(call)

    def _latest(self) -> tuple[int, list[bytes]] | None:
        for index in range(len(self._history) - 1, -1, -1):
            if _line(self._history, index).role == self._role:
                return index, [bytes(raw) for raw in _full(self._history, index)]
        return None


def _line(history: Sequence[bytes], index: int) -> _Line:
    try:
        return _LINE.decode(history[index])
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError) as error:
        raise RowError(f"line {index} of the history cannot be read: {error}") from None


def _full(history: Sequence[bytes], index: int) -> list[Raw]:
    """The messages of a call, gathered from its last to its first through the calls that it builds on."""
    parts: list[list[Raw]] = []
    wanted: int | None = None  # how many of the messages of the call at hand; None: all
    while True:
        line = _line(history, index)
        before, kept = line.prefix or (0, 0)
        parts.append(line.messages if wanted is None else line.messages[: max(0, wanted - kept)])
        if line.prefix is None:
            break
        if not 0 <= before < index or kept < 0:
            raise RowError(f"line {index} of the history builds on line {before}, which does not come before it")
        index, wanted = before, kept if wanted is None else min(kept, wanted)
    return [message for part in reversed(parts) for message in part]


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """How many messages both start with; as bytes, because 1 == 1.0 == True is not the same message."""
    for count, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return count
    return min(len(one), len(other))
