"""A run's large values, in a JetStream object store: written once, named by their content.

The layout is the one that every NATS client knows as an object store (ADR-20): chunks on `$O.<bucket>.C.<id>`, then
one message that describes them on `$O.<bucket>.M.<name>`. Our own few lines instead of the client library's,
because that makes a consumer for each read and gives up when the broker restarts.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from .bus import Bus, fence, is_lost_race, patiently, pause
from .errors import PublishRefused, RowError
from .llm import SEGMENT_MARK, read_segment
from .orchestrator import REF_MARK, Ref, bucket, decode_outcome, encode, read_ref
from .telemetry import logger

CHUNK_BYTES = 128 << 10
"""What the object stores of all clients use."""
_READ_TRIES = 5


class _Meta(Struct, omit_defaults=True):
    """What ADR-20 wants to know of an object."""

    name: str
    bucket: str
    nuid: str
    size: int
    chunks: int
    digest: str
    mtime: str = ""
    options: dict[str, int] = {}
    deleted: bool = False


_NAMES = re.compile(rb'\{"\$(?:large|calls)":\{"sha256":"([0-9a-f]{64})"')

T = TypeVar("T")
log = logger("payload")
_calls = msgspec.json.Decoder(list[Raw])
_meta = msgspec.json.Decoder(_Meta)


def stream_of(run: str) -> str:
    """Name of the stream behind the run's object store."""
    return f"OBJ_{bucket(run)}"


def stream_config(run: str) -> dict[str, Any]:
    """The object store of a run, as JetStream's API makes it."""
    name = bucket(run)
    return {
        "name": stream_of(run),
        "subjects": [f"$O.{name}.C.>", f"$O.{name}.M.>"],
        "discard": "new",
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "storage": "file",
    }


class Payloads:
    """The large values of one run. Calls wait for a broker that is away or full."""

    def __init__(self, bus: Bus, run: str, still_wanted: Callable[[], Awaitable[object]] | None = None) -> None:
        """`still_wanted` raises if the run was ended; without it a `put` into a store that is gone waits for ever."""
        self._bus = bus
        self._still_wanted = still_wanted
        self._bucket = bucket(run)
        self._stream = stream_of(run)

    async def put(self, body: bytes) -> Ref:
        """Stores a value, unless it is there already; returns when the broker has all of it."""
        ref = Ref.of(body)
        if await self._has(ref.sha256):
            return ref
        nuid = secrets.token_hex(11)
        chunks = [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)]
        last = 0
        for chunk in chunks:
            last = await self._append(self._chunk_subject(nuid), chunk, last)
        meta = _Meta(
            name=ref.sha256,
            bucket=self._bucket,
            nuid=nuid,
            size=len(body),
            chunks=len(chunks),
            digest="SHA-256=" + base64.urlsafe_b64encode(bytes.fromhex(ref.sha256)).decode(),
            mtime=datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            options={"max_chunk_size": CHUNK_BYTES},
        )
        # Expecting none: of two that write the same value at once, one describes it and the other's chunks go.
        await self._append(self._meta_subject(ref.sha256), msgspec.json.encode(meta), 0)
        if (there := await self._describe(ref.sha256)) is not None and there.nuid != nuid:
            await self._purge(self._chunk_subject(nuid))
        return ref

    async def get(self, ref: Ref) -> bytes:
        """The value. Raises `RowError` if the store does not have it (any more)."""
        for _ in range(_READ_TRIES):  # a follower that answers may lag behind the leader that took the value
            meta = await self._describe(ref.sha256)
            if meta is None and await self._has(ref.sha256):
                await pause(self._bus)
                continue
            if meta is None or meta.deleted:
                break
            body = await self._patiently(lambda nuid=meta.nuid: self._chunks(nuid))  # type: ignore[misc]
            if hashlib.sha256(body).hexdigest() == ref.sha256:
                return body
            await pause(self._bus)
        raise RowError(f"a value of {ref.bytes} bytes, {ref.sha256}, is not in the object store {self._bucket}")

    async def names(self) -> set[str]:
        """Names of all values."""
        found = set()
        async for message in self._bus.read(self._stream, subject=f"$O.{self._bucket}.M.>"):
            meta = _meta.decode(message.data)
            if not meta.deleted:
                found.add(meta.name)
        return found

    async def free(self, name: str) -> None:
        """Forgets a value."""
        meta = await self._describe(name)
        if meta is not None:
            await self._purge(self._meta_subject(name))
            await self._purge(self._chunk_subject(meta.nuid))

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        return await patiently(self._bus, work, self._still_wanted)

    async def _append(self, subject: str, body: bytes, last: int) -> int:
        """Stores a message behind the subject's `last` one, once, however often it must be sent; its sequence."""
        try:
            return (await self._patiently(lambda: self._bus.publish(subject, body, fence(last)))).seq
        except PublishRefused as error:
            if not is_lost_race(error):
                raise
            return await self._patiently(lambda: self._bus.last_of(subject))

    async def _has(self, name: str) -> bool:
        return await self._patiently(lambda: self._bus.last_of(self._meta_subject(name))) != 0

    async def _describe(self, name: str) -> _Meta | None:
        stored = await self._patiently(lambda: self._bus.last(self._stream, self._meta_subject(name)))
        return _meta.decode(stored.data) if stored is not None else None

    async def _chunks(self, nuid: str) -> bytes:
        subject = self._chunk_subject(nuid)
        return b"".join([message.data async for message in self._bus.read(self._stream, subject=subject)])

    async def _purge(self, subject: str) -> None:
        await self._bus.api(f"STREAM.PURGE.{self._stream}", {"filter": subject})

    def _chunk_subject(self, nuid: str) -> str:
        return f"$O.{self._bucket}.C.{nuid}"

    def _meta_subject(self, name: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


# --- putting values back --------------------------------------------------------------------------------------------


async def inlined(segment: bytes, store: Payloads) -> bytes:
    """A JSON segment with the values in place of the references to them. Raises `RowError` if one is lost."""
    if REF_MARK not in segment:
        return segment
    return msgspec.json.encode(await _filled(msgspec.json.decode(segment), store))


async def _filled(value: Any, store: Payloads) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$large"} and (ref := read_ref(msgspec.json.encode(value))) is not None:
            return Raw(await store.get(ref))
        return {key: await _filled(inner, store) for key, inner in value.items()}
    if isinstance(value, list):
        return [await _filled(inner, store) for inner in value]
    return value


async def whole(body: bytes, store: Payloads) -> bytes:
    """An outcome's bytes with everything in it that lies in the store; most have nothing there and stay as they are.

    A value that is lost leaves its reference behind, and a warning.
    """
    if REF_MARK not in body and SEGMENT_MARK not in body:
        return body
    record = decode_outcome(body)
    history: list[Raw] = []
    try:
        state, line = await inlined(bytes(record.state), store), await inlined(bytes(record.input), store)
        for call in record.history:
            segment = read_segment(bytes(call))
            history += (
                [call] if segment is None else msgspec.json.decode(await store.get(segment.calls), type=list[Raw])
            )
    except RowError as error:
        log.warning("payload.lost", row=record.row, error=str(error))
        return body
    return encode(msgspec.structs.replace(record, state=Raw(state), input=Raw(line), history=history))


def references(body: bytes) -> set[str]:
    """Names of the values that an outcome refers to."""
    return {match.decode() for match in _NAMES.findall(body)}
