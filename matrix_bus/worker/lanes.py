"""What one run is pulled through in one worker: a lane for each role, and the slots that it may fill."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

from ..bus import Bus, Lane, Message
from ..errors import BusError
from ..orchestrator import work_stream
from .pulling import Pool, Pump, Share


class Lanes:
    """Closed and opened again when the run is paused and resumed; pools may be replaced at any time."""

    def __init__(
        self,
        bus: Bus,
        run: str,
        pools: Mapping[str, Pool],
        weight: float,
        pump: Pump,
        receive: Callable[[Share, Message], None],
    ) -> None:
        """`receive` is given each message with what its slot is taken from."""
        self._bus = bus
        self._stream = work_stream(run)
        self._shares = {role: Share(pool, role, weight=weight) for role, pool in pools.items()}
        self._pump = pump
        self._receive = receive

    @property
    def gone(self) -> bool:
        """True if the run's stream was deleted under us."""
        return any(share.lane is not None and share.lane.gone for share in self._shares.values())

    @property
    def is_open(self) -> bool:
        return any(share.lane is not None for share in self._shares.values())

    @property
    def roles(self) -> list[str]:
        return list(self._shares)

    async def open(self) -> None:
        """Begins to ask for messages. Raises `BusError`."""
        for role, share in self._shares.items():
            receive = functools.partial(self._receive, share)
            lane = Lane(self._bus, self._stream, role, receive, functools.partial(self._low, share))
            await lane.open()
            share.lane = lane
            self._pump.add(share)

    def _low(self, share: Share) -> None:
        self._pump.touch(share.pool)

    async def close(self) -> None:
        """Asks for nothing more; what is on its way still arrives."""
        lanes = []
        for share in self._shares.values():
            self._pump.remove(share)
            lanes.append(share.lane)
            share.lane = None
        for lane in lanes:
            with contextlib.suppress(BusError, OSError):
                if lane is not None:
                    await lane.close()

    def arrange(self, pools: Mapping[str, Pool], weight: float) -> None:
        """Other slots, another part of those that are shared: for what is asked for from now on."""
        for role, pool in pools.items():
            share = self._shares[role]
            share.weight = weight
            if pool is not share.pool:
                self._pump.remove(share)
                share.move_to(pool)
                if share.lane is not None:
                    self._pump.add(share)
