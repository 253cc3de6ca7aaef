"""A connection to the broker that all tests of this folder share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from tests.helpers import connected


@pytest.fixture
async def bus(shared_broker: Broker) -> AsyncIterator[Bus]:
    async with connected(shared_broker.url) as connection:
        yield connection
