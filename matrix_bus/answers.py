"""Answers of models, kept by what was asked: a hop that is executed again repeats only what was not answered yet.

Opt-in (`llm.cache`). Seeds follow from the row, the hop and the call's place in it, so a redelivered hop asks for the
same bytes again, and so does a run that is repeated after a change in a late role.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from .bus import STREAM_NOT_FOUND, Bus, create_bucket
from .errors import BusError, NobodyListens, PublishRefused
from .llm import ChatRequest, Reply
from .telemetry import logger

BUCKET = "mb_answers"
_STREAM = f"KV_{BUCKET}"
_SHARED = "_"

log = logger("answers")
_decode = msgspec.json.Decoder(Reply)


async def prepare(bus: Bus, replicas: int = 1) -> None:
    """Creates the bucket, if it is not there yet. Raises `BusError`."""
    await create_bucket(bus, BUCKET, replicas)


async def purge(bus: Bus, run: str) -> None:
    """Deletes the answers that were kept for one run alone. Raises `BusError`."""
    try:
        await bus.api(f"STREAM.PURGE.{_STREAM}", {"filter": f"$KV.{BUCKET}.{run}.*"})
    except PublishRefused as error:
        if error.code != STREAM_NOT_FOUND:
            raise


class Answers:
    """What was answered in a run, or, without a run, in any that shares its answers."""

    def __init__(self, bus: Bus, run: str = "") -> None:
        self._bus = bus
        self._begin = f"$KV.{BUCKET}.{run or _SHARED}."

    def _key(self, request: ChatRequest) -> str:
        return self._begin + blake2b(msgspec.json.encode(request.body()), digest_size=20).hexdigest()

    async def find(self, request: ChatRequest) -> Reply | None:
        """What was answered to exactly this before. A broker that does not tell has not kept it."""
        try:
            stored = await self._bus.last(_STREAM, self._key(request))
            return _decode.decode(stored.data) if stored is not None and stored.data else None
        except (BusError, msgspec.DecodeError) as error:
            log.info("answers.not_read", error=str(error))
            return None

    async def keep(self, request: ChatRequest, reply: Reply) -> None:
        """Stores an answer; returns when it is safe. One that cannot be stored is asked for again, no more."""
        try:
            await self._bus.publish(self._key(request), msgspec.json.encode(reply))
        except (BusError, NobodyListens) as error:
            log.info("answers.not_kept", error=str(error))
