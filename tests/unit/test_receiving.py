"""The connection's bytes, cut anywhere, become the same messages; whatever else comes goes to the library."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ProtocolError

from matrix_bus.bus import Message
from matrix_bus.bus.receiving import Receiver
from matrix_bus.bus.wire import hpub

OURS, THEIRS = 7, 8


class Library:
    """What of the client library is called."""

    def __init__(self) -> None:
        self.got: list[tuple[Any, ...]] = []

    async def _process_msg(self, *message: Any) -> None:
        self.got.append(("MSG", *message))

    async def _process_ping(self) -> None:
        self.got.append(("PING",))

    async def _process_pong(self) -> None:
        self.got.append(("PONG",))

    async def _process_err(self, text: str) -> None:
        self.got.append(("ERR", text))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.got.append(("INFO", info))


def fed(chunks: list[bytes]) -> tuple[list[tuple[str, str, dict[str, str], bytes]], list[tuple[Any, ...]]]:
    """(our messages, what the library got) of these reads."""
    library: Any = Library()
    receiver = Receiver(library)
    ours: list[tuple[str, str, dict[str, str], bytes]] = []

    def take(message: Message) -> None:
        ours.append((message.subject, message.reply, message.headers, message.data))
        if message.data == b"bad":
            raise ValueError("a mistake of ours")

    receiver.direct[OURS] = take

    async def feed() -> None:
        for chunk in chunks:
            await receiver.parse(chunk)

    asyncio.run(feed())
    return ours, library.got


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(stream), *(place % (len(stream) + 1) for place in at)})
    return [stream[a:b] for a, b in itertools.pairwise(places)]


HEADERS = b"NATS/1.0\r\nMb-Lease: a:b c\r\nEmpty: \r\n\r\n"
STATUS = b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 3\r\n\r\n"
STREAM = b"".join(
    [
        b'INFO {"max_payload": 1048576}\r\n',
        b"MSG a.b 7 5\r\nhello\r\n",
        b"PING\r\n",
        b"MSG a.b 7 _INBOX.x 0\r\n\r\n",
        b"+OK\r\n",
        b"HMSG q.r 7 $JS.ACK.x %d %d\r\n" % (len(HEADERS), len(HEADERS) + 4) + HEADERS + b"\r\n\r\n\r\n",
        b"HMSG in.box 7 %d %d\r\n" % (len(STATUS), len(STATUS)) + STATUS + b"\r\n",
        b"MSG other 8 2\r\nhi\r\n",
        b"HMSG other 8 re %d %d\r\n" % (len(HEADERS), len(HEADERS) + 1) + HEADERS + b"x\r\n",
        b"-ERR 'Permissions Violation for X'\r\n",
        b"MSG a.b 7 3\r\nbad\r\n",
        b"PONG\r\n",
        b"MSG last 7 9\r\nMSG 1 7 1\r\n",
    ]
)
EXPECTED = (
    [
        ("a.b", "", {}, b"hello"),
        ("a.b", "_INBOX.x", {}, b""),
        ("q.r", "$JS.ACK.x", {"Mb-Lease": "a:b c", "Empty": ""}, b"\r\n\r\n"),
        ("in.box", "", {"Status": "408", "Description": "Request Timeout", "Nats-Pending-Messages": "3"}, b""),
        ("a.b", "", {}, b"bad"),
        ("last", "", {}, b"MSG 1 7 1"),
    ],
    [
        ("INFO", {"max_payload": 1048576}),
        ("PING",),
        ("MSG", 8, b"other", b"", b"hi", None),
        ("MSG", 8, b"other", b"re", b"x", HEADERS),
        ("ERR", "'permissions violation for x'"),
        ("PONG",),
    ],
)


def test_a_stream_in_one_piece_and_byte_by_byte() -> None:
    assert fed([STREAM]) == EXPECTED
    assert fed([STREAM[at : at + 1] for at in range(len(STREAM))]) == EXPECTED


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_cut_anywhere(places: list[int]) -> None:
    assert fed(cut(STREAM, places)) == EXPECTED


@given(st.binary(max_size=3000), st.lists(st.integers(0, 10_000), max_size=8))
def test_what_is_published_is_what_is_received(body: bytes, places: list[int]) -> None:
    command = b"".join(hpub("s.1", "re.ply", {"A": "1", "B-c": "x:y"}, body))
    delivered = command.replace(b"HPUB s.1 re.ply", b"HMSG s.1 7 re.ply", 1)
    assert fed(cut(delivered, places))[0] == [("s.1", "re.ply", {"A": "1", "B-c": "x:y"}, body)]
    plain = b"".join(hpub("s.1", "", None, body)).replace(b"PUB s.1 ", b"MSG s.1 7", 1)
    assert fed(cut(plain, places))[0] == [("s.1", "", {}, body)]


def test_a_large_message_in_many_reads() -> None:
    body = bytes(range(256)) * 40_000
    stream = b"MSG a 7 %d\r\n" % len(body) + body + b"\r\nPING\r\n"
    ours, library = fed([stream[at : at + 65_536] for at in range(0, len(stream), 65_536)])
    assert ours == [("a", "", {}, body)]
    assert library == [("PING",)]


def test_a_new_connection_begins_anew() -> None:
    library: Any = Library()
    receiver = Receiver(library)

    async def feed() -> None:
        await receiver.parse(b"MSG a 8 100\r\nhalf")
        receiver.reset()
        await receiver.parse(b"PING\r\n")

    asyncio.run(feed())
    assert library.got == [("PING",)]


def test_a_connection_that_is_lost_while_the_library_works_leaves_nothing_behind() -> None:
    library: Any = Library()
    receiver = Receiver(library)

    async def lost() -> None:
        receiver.reset()

    library._process_ping = lost

    async def feed() -> None:
        await receiver.parse(b"PING\r\nMSG a 8 100\r\nhalf")
        await receiver.parse(b"PONG\r\n")

    asyncio.run(feed())
    assert library.got == [("PONG",)]


@pytest.mark.parametrize(
    "bad", [b"GET / HTTP/1.1\r\n", b"MSG a\r\n", b"MSG a 7 many\r\n", b"HMSG a 7 x 5\r\n", b"x" * 5000]
)
def test_what_is_no_nats(bad: bytes) -> None:
    with pytest.raises(ProtocolError):
        fed([bad])
