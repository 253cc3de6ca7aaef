"""What one run is pulled through in one worker: a lane for each role, and the slots that it may fill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from nats.aio.msg import Msg

from ..bus import Bus, Lane
from ..errors import BusError
from ..orchestrator import work_stream
from .pulling import Pool, Pump


class Lanes:
    """Closed and opened again when the run is paused and resumed; pools may be replaced at any time."""

    def __init__(
        self, bus: Bus, run: str, pools: Mapping[str, Pool], pump: Pump, receive: Callable[[Msg], None]
    ) -> None:
        self._bus = bus
        self._stream = work_stream(run)
        self._pools = dict(pools)
        self._pump = pump
        self._receive = receive
        self._lanes: dict[str, Lane] = {}
        self._weight = 1.0

    @property
    def gone(self) -> bool:
        """True if the run's stream was deleted under us."""
        return any(lane.gone for lane in self._lanes.values())

    @property
    def is_open(self) -> bool:
        return bool(self._lanes)

    @property
    def roles(self) -> list[str]:
        return list(self._pools)

    def pool(self, role: str) -> Pool:
        """The slots that the role's deliveries take."""
        return self._pools[role]

    async def open(self) -> None:
        """Begins to ask for messages. Raises `BusError`."""
        for role, pool in self._pools.items():
            lane = Lane(self._bus, self._stream, role, self._receive)
            lane.weight = self._weight
            await lane.open()
            self._lanes[role] = lane
            self._pump.add(pool, lane)

    async def close(self) -> None:
        """Asks for nothing more; what is on its way still arrives."""
        lanes, self._lanes = self._lanes, {}
        for role, lane in lanes.items():
            self._pump.remove(self._pools[role], lane)
        for lane in lanes.values():
            with contextlib.suppress(BusError, OSError):
                await lane.close()

    def heard(self, role: str, at: float) -> None:
        """Something arrived through the role's lane."""
        pool, lane = self._pools[role], self._lanes.get(role)
        if lane in pool.lanes:
            pool.lanes[lane] = at
        self._pump.touch(pool)

    def arrange(self, pools: Mapping[str, Pool], weight: float) -> None:
        """Other slots, another share of those that are shared: for what is asked for from now on."""
        self._weight = weight
        for role, pool in pools.items():
            old, lane = self._pools[role], self._lanes.get(role)
            if lane is not None:
                lane.weight = weight
            if pool is not old:
                self._pools[role] = pool
                if lane is not None:
                    self._pump.remove(old, lane)
                    self._pump.add(pool, lane)
