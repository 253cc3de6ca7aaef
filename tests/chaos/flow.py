"""The workflow under attack: eight hops, a next role that every execution chooses anew, values too big for a message.

Every handler call appends a line to a file of its process when it starts and one when it ends. A call's token goes
into the state: two executions of one hop whose rows came from different calls show a row that was forked.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from pathlib import Path

import matrix_bus as mb
from tests.chaos.content import LAST_HOP, PAGE_EVERY, page

_calls = os.open(Path(os.environ["CHAOS_CALLS"]) / str(os.getpid()), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_seconds = float(os.environ.get("CHAOS_SECONDS", "0.01"))
_chance = random.Random()


class Walk(mb.State):
    x: int
    parent: str = ""
    page: mb.Large[str] = mb.Large("")


flow = mb.Workflow("chaos", state=Walk, start="begin")


async def step(row: mb.Row[Walk]) -> mb.Next | mb.Outcome:
    state = row.state
    token = secrets.token_hex(6)
    call = f"{row.id} {row.hop} {row.attempt} {token} {state.parent or '-'}"
    os.write(_calls, f"> {call} {time.time():.6f}\n".encode())
    if state.x % PAGE_EVERY == 0:
        text = await state.page.get() if row.hop > 1 else ""
        if row.hop > 1 and text != page(state.x, row.hop - 1):
            raise AssertionError(f"row {row.id} hop {row.hop} has the page of another hop")
        state.page = mb.Large(page(state.x, row.hop))
    await asyncio.sleep(_seconds * _chance.uniform(0.5, 1.5))
    state.parent = token
    os.write(_calls, f"< {call} {time.time():.6f}\n".encode())
    if row.hop == LAST_HOP:
        return mb.success()
    return mb.to(_chance.choice(["left", "right", "middle"]))


for name in ("begin", "left", "right", "middle"):
    flow.role(name=name, routes=["left", "right", "middle"])(step)
