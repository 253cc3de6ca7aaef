"""The record of a row's model calls: one JSON line per call, carried along on the row.

A conversation grows by repeating itself, so a call stores a reference to the role's call before it, and only
the messages after those that both begin with. References are places in the history, counted over all calls: lines
may be appended, or cut off at the end, never removed from the front or the middle.

A history that has grown too large for a message is closed up to there: its calls go to the object store as a
segment, and one line stands for them. Places go on counting, so references into a segment stay right.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, cast

import msgspec
from msgspec import Raw, Struct

from ..errors import RowError
from ..orchestrator import UNREADABLE, Ref, Usage
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
    first_s: float = 0.0
    """Until the first piece of a streamed reply."""
    cached: bool = False
    """True if the answer was kept from before."""
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
    """All messages of the call at `index` of a history without segments, as an outcome line has it.

    Raises `RowError` if a line is unreadable or refers forward.
    """
    try:
        return [_MESSAGE.decode(raw) for raw in _full(history, index)]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RowError(f"line {index} of the history has an unreadable message: {error}") from None


# --- calls that are kept out of the message ------------------------------------------------------------------------


class Segment(Struct, frozen=True):
    """A line of a history that stands for the calls before it: they lie in the object store as one JSON array."""

    calls: Ref = msgspec.field(name="$calls")
    count: int
    last: dict[str, tuple[int, list[str]]]
    """By role: place of its latest call in there, and what its messages were, so that the next call of the role
    can refer to them without anybody reading them back."""


SEGMENT_MARK = b'{"$calls":'
_SEGMENT = msgspec.json.Decoder(Segment)


def read_segment(line: bytes) -> Segment | None:
    """The segment that a line of a history stands for; None if the line is a call."""
    if not line.startswith(SEGMENT_MARK):
        return None
    try:
        return _SEGMENT.decode(line)
    except UNREADABLE as error:
        raise RowError(f"this line of a history cannot be read: {error}: {line[:200]!r}") from None


def segments_of(history: Sequence[bytes]) -> list[Segment]:
    """The segments that a history begins with."""
    found = []
    for line in history:
        if (segment := read_segment(line)) is None:
            break
        found.append(segment)
    return found


def segment_body(history: Sequence[bytes]) -> bytes:
    """The calls of a history that are still in the message, as the store keeps them: a JSON array."""
    return b"[" + b",".join(history[len(segments_of(history)) :]) + b"]"


def with_segment(history: Sequence[bytes], ref: Ref) -> list[bytes]:
    """The history once `segment_body` of it is stored as `ref`."""
    places = _Places(history)
    calls = history[places.skip :]
    latest = {_line(calls, index).role: places.base + index for index in range(len(calls))}
    last = {role: (at, known) for role, at in latest.items() if (known := places.digests(at)) is not None}
    return [*history[: places.skip], _ENCODER.encode(Segment(ref, len(calls), last))]


class _Places:
    """Where the calls of a history are: in segments up to `base`, and behind `skip` lines from there on."""

    def __init__(self, history: Sequence[bytes]) -> None:
        self._history = history
        self._segments = segments_of(history)
        self.skip = len(self._segments)
        self.base = sum(segment.count for segment in self._segments)

    def index(self, place: int) -> int:
        """Index in the list of the call at this place."""
        return place - self.base + self.skip

    def latest(self, role: str) -> tuple[int, list[str]] | None:
        """Place and message digests of the role's latest call."""
        for index in range(len(self._history) - 1, self.skip - 1, -1):
            if _line(self._history, index).role == role:
                place = index - self.skip + self.base
                known = self.digests(place)
                return (place, known) if known is not None else None
        return next((segment.last[role] for segment in reversed(self._segments) if role in segment.last), None)

    def digests(self, place: int) -> list[str] | None:
        """What the messages of a call were, also those that it has from a call in a segment; None if unknown."""
        parts: list[list[str]] = []
        wanted: int | None = None  # how many of the messages of the call at hand; None: all
        while place >= self.base:
            line = _line(self._history, self.index(place))
            before, kept = line.prefix or (-1, 0)
            own = line.messages if wanted is None else line.messages[: max(0, wanted - kept)]
            parts.append([_digest(message) for message in own])
            if line.prefix is None:
                break
            if not 0 <= before < place or kept < 0:
                raise RowError(f"call {place} of the history builds on call {before}, which does not come before it")
            place, wanted = before, kept if wanted is None else min(kept, wanted)
        else:
            known = (last for segment in self._segments for last in segment.last.values())
            stored = next((digests for at, digests in known if at == place), None)
            if stored is None:
                return None
            parts.append(stored[:wanted])
        return [digest for part in reversed(parts) for digest in part]


def _digest(message: bytes | Raw) -> str:
    """72 bits: within a row, and at the same place of a conversation, nothing else will have them."""
    return base64.b64encode(blake2b(message, digest_size=9).digest()).decode()


class Recorder:
    """Writes the calls of one role into a history, each in the place that it had when it was started."""

    def __init__(self, history: list[bytes], role: str) -> None:
        self._history = history
        self._role = role
        self._places = _Places(history)
        self._last: tuple[int, list[str]] | None = None
        """Place and message digests of the role's latest call."""

    def open(self, call: Call) -> tuple[int, Call]:
        """Take the next place for a call that holds all its messages; returns the place and the call to keep.

        Until `close` fills the place it says that the call was never finished, which is then the truth.
        """
        whole = [_ENCODER.encode(message) for message in call.messages]
        digests = [_digest(message) for message in whole]
        last = self._last or self._places.latest(self._role)
        place = len(self._history) - self._places.skip + self._places.base
        kept = _common(last[1], digests) if last else 0
        rest = [Raw(message) for message in whole[kept:]]
        call = msgspec.structs.replace(
            call,
            prefix=(last[0], kept) if last and kept else None,
            # Encoded already: Raw goes into the line as it is, where a reader will find messages.
            messages=cast("list[Message]", rest),
        )
        unfinished = Failure("Unfinished", "the handler ended before this call did")
        self._history.append(_ENCODER.encode(msgspec.structs.replace(call, error=unfinished)))
        self._last = place, digests
        return place, call

    def close(self, place: int, call: Call) -> None:
        """Put the finished call in its place."""
        self._history[self._places.index(place)] = _ENCODER.encode(call)


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


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many messages both start with; by their bytes, because 1 == 1.0 == True is not the same message."""
    for count, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return count
    return min(len(one), len(other))
