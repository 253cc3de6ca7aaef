"""How many new objects set a worker process off to look for garbage in cycles: in proportion to what is alive.

Python looks when so many more objects were made than freed, and then at all that were made since it looked last. With
thousands of rows in flight as many are freed as are made: the new ones pile up, and a chance sets it off. All of them
are looked at in one go, while the loop stands still: 1.9 s with 50 000 rows.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

_EVERY_S = 1.0
_PER_DELIVERY = 8
"""A third of the objects that a row in flight is made of. Python itself looks at old ones when a quarter is new."""


async def pace(holds: Callable[[], int]) -> None:
    """Runs until cancelled, for the whole process; `holds` says how many deliveries are held."""
    least, *older = gc.get_threshold()
    while True:
        gc.set_threshold(max(least, _PER_DELIVERY * holds()), *older)
        await asyncio.sleep(_EVERY_S)
