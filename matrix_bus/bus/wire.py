"""JetStream's own wire: replies of its API, error codes, and what an ack subject says."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from ..errors import BusError, NobodyListens, PublishRefused

# JetStream's err_code values (server/errors.json of nats-server).
WRONG_LAST_SEQUENCE = 10071
NO_MESSAGE = 10037
STREAM_NOT_FOUND = 10059
STREAM_MADE_OTHERWISE = 10058
TOO_FEW_SERVERS = (10074, 10005)
"""No cluster at all; a cluster without enough servers for the copies."""


Headers = Mapping[str, str] | str
"""Of a message: by name, or the lines as they travel, each with its end."""


class ApiError(Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(Struct):
    """The broker's answer to a publish; without `error` it says that the message is stored."""

    seq: int = 0
    duplicate: bool = False
    error: ApiError | None = None


class Stored(Struct):
    """A message as it lies in a stream."""

    subject: str
    seq: int
    headers: Mapping[str, str]
    data: bytes


class Message:
    """A message that was delivered to this process."""

    __slots__ = ("_headers", "_raw", "body", "reply", "subject")

    def __init__(self, subject: str, reply: str, body: bytes | memoryview, raw_headers: bytes = b"") -> None:
        self.subject = subject
        self.reply = reply
        self.body = body
        """Where it was read to, together with what came beside it: for whoever decodes it soon, and then lets go."""
        self._raw = raw_headers
        self._headers: dict[str, str] | None = None

    @property
    def data(self) -> bytes:
        """A copy of the body, to keep."""
        return bytes(self.body)

    @property
    def headers(self) -> dict[str, str]:
        """Name to value, parsed when asked for; of an answer by the broker itself `Status` and `Description` too."""
        if self._headers is None:
            self._headers = parse_headers(self._raw) if self._raw else {}
        return self._headers

    def header(self, name: str) -> str:
        """One of them, without parsing the others; empty if it is not there. Names are as they were written."""
        mark = _mark(name)
        start = self._raw.find(mark)
        if start < 0:
            return ""
        start += len(mark)
        return self._raw[start : self._raw.find(b"\r\n", start)].decode().strip()

    @property
    def has_headers(self) -> bool:
        """Whether there are any."""
        return bool(self._raw)


@functools.cache
def _mark(name: str) -> bytes:
    return f"\r\n{name}:".encode()


class GotMessage(Struct):
    subject: str
    seq: int
    data: str = ""
    hdrs: str = ""


class GetReply(Struct):
    message: GotMessage | None = None
    error: ApiError | None = None


_pub_ack = msgspec.json.Decoder(PubAck)
get_reply = msgspec.json.Decoder(GetReply)


def answer(subject: str, reply: Message) -> Message:
    """A reply, if somebody gave it. Raises `NobodyListens`."""
    if reply.has_headers and reply.headers.get("Status") == "503":
        raise NobodyListens(f"nobody answers on {subject}")
    return reply


def confirmation(subject: str, reply: Message) -> PubAck:
    """What a reply to a published message says. Raises `PublishRefused`."""
    found = _pub_ack.decode(answer(subject, reply).body)
    if found.error is not None:
        raise PublishRefused(subject, found.error.err_code, found.error.description)
    return found


def standing(subject: str, reply: Message) -> int:
    """The sequence that a fence which cannot hold was refused with: no error, since that is what was asked for.

    Raises `PublishRefused` for another refusal, `BusError` if the message was stored.
    """
    error = _pub_ack.decode(answer(subject, reply).body).error
    if error is None:
        raise BusError(f"the broker took a message on {subject} that it had to refuse: is it a stream's subject?")
    if error.err_code == WRONG_LAST_SEQUENCE and (found := _WRONG_LAST.search(error.description)):
        return int(found[1])
    raise PublishRefused(subject, error.err_code, error.description)


_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_WRONG_LAST = re.compile(r"wrong last sequence: (\d+)")


def fence(last: int, on: str = "") -> dict[str, str]:
    """Headers with which a message is stored only if `last` is the sequence of its subject's last message, 0 for none.

    With `on`, of the last message on that subject of the stream, wildcards allowed.
    """
    return {_EXPECTED: str(last), **({f"{_EXPECTED}-Subject": on} if on else {})}


def fence_lines(last: int, on: str) -> str:
    """The same as lines, where the difference counts."""
    return f"{_EXPECTED}: {last}\r\n{_EXPECTED}-Subject: {on}\r\n"


def is_lost_race(error: PublishRefused) -> bool:
    """True if the fence or the guard refused: the subject has moved on since the sequence that was expected."""
    return error.code == WRONG_LAST_SEQUENCE


def delivery_facts(ack_subject: str) -> tuple[int, int]:
    """(deliveries so far, stream sequence) from a delivered message's ack subject, either of its two forms."""
    tokens = ack_subject.split(".")
    start = 4 if len(tokens) == 9 else 6
    return int(tokens[start]), int(tokens[start + 1])


def parse_headers(raw: bytes) -> dict[str, str]:
    """Name to value, from a message's header block; a status in its first line becomes `Status` and `Description`."""
    first, *lines = raw.decode("utf-8", "replace").split("\r\n")
    found = {name: value.strip() for name, sep, value in (line.partition(":") for line in lines) if sep}
    if len(first) > len("NATS/1.0"):
        found["Status"], _, found["Description"] = first.removeprefix("NATS/1.0").strip().partition(" ")
    return found


def pub(subject: str, text: str) -> bytes:
    """The command that publishes a short text without headers and reply, such as an ack."""
    return f"PUB {subject} {len(text)}\r\n{text}\r\n".encode()


def hpub(subject: str, reply: str, headers: Headers | None, body: bytes) -> tuple[bytes, bytes, bytes]:
    """The command that publishes a message, in parts: to join them would be to copy the body.

    Names and values of headers must hold no line ends: they are ours alone.
    """
    if not headers:
        return f"PUB {subject} {reply} {len(body)}\r\n".encode(), body, b"\r\n"
    if not isinstance(headers, str):
        headers = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    size = len("NATS/1.0\r\n\r\n") + (len(headers) if headers.isascii() else len(headers.encode()))
    head = f"HPUB {subject} {reply} {size} {size + len(body)}\r\nNATS/1.0\r\n{headers}\r\n"
    return head.encode(), body, b"\r\n"
