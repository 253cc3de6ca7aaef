"""What each stage of a hop costs the worker: the real functions, one after another, without a broker.

    python -m benchmarks.stages [--hops 20000]

The message is one of `benchmarks.workload`, of middle length. Times are CPU microseconds of this process per hop, the
best of five rounds. `wake` is what asyncio takes to start a task for a delivery and to wake it with the confirmation.
What a worker spends beyond the sum (see `cpu_us_per_hop_worker` of `benchmarks.hop`) are system calls, the event loop
itself, and the calls between these functions. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import uvloop
from nats.aio.client import Client

from benchmarks.workload import RUN_SEED, flow, line, sizes
from matrix_bus import Row
from matrix_bus.agent import encode_state
from matrix_bus.bus import Message, fence, fence_lines
from matrix_bus.bus.receiving import Receiver
from matrix_bus.bus.wire import confirmation, hpub, pub
from matrix_bus.orchestrator import (
    HEADER_LEASE,
    RowMessage,
    admit,
    advance,
    decode,
    encode,
    family,
    hop_subject,
    row_seed,
)
from matrix_bus.worker.delivery import Delivery

_RUN = "bench"
_ROUNDS = 5
_READ_BYTES = 32 << 10
_LEASE = f"$JS.ACK.W_{_RUN}._.1.7.7.1790000000000000000.0"
_ACK = f"$JS.ACK.W_{_RUN}.solver.1.4242.4242.1790000000000000000.0"
_PUBACK = b'{"stream":"W_bench","seq":4243}'

Stage = Callable[[int], Awaitable[None]]


def _message() -> bytes:
    """A hop's body after four of eight hops, of the size that the hop benchmark has on average."""
    row = RowMessage(input=msgspec.Raw(line(0)), id="q0", seed=row_seed(RUN_SEED, 0, 0), submitted_at=time.time())
    message = admit(row, _RUN, 0, flow.start, b"", time.time())
    state = flow.begin(line(0))
    state.said.extend("x" * 1024 for _ in range(4))
    message.state = encode_state(state)
    return encode(message)


def stages() -> dict[str, Stage]:
    """What is timed, by name; each does its part so many times."""
    body = _message()
    subject = hop_subject(_RUN, "solver", 0, 5)
    headers = {**fence(4242, family(_RUN, 0)), HEADER_LEASE: _LEASE}
    delivered = b"".join(hpub(subject, _ACK, headers, body)).replace(
        b"HPUB " + subject.encode(), b"HMSG " + subject.encode() + b" 1"
    )
    confirmed = b"MSG _INBOX.x.1 1 %d\r\n%b\r\n" % (len(_PUBACK), _PUBACK)
    arrived = Message(subject, _ACK, body, b"")

    def receiver(on_message: Callable[[Message], Any]) -> Receiver:
        made = Receiver(cast(Client, None))
        made.direct[1] = on_message
        return made

    async def parse(wire: bytes, count: int, on_message: Callable[[Message], Any]) -> None:
        its = receiver(on_message)
        whole = wire * count
        for at in range(0, len(whole), _READ_BYTES):
            await its.parse(whole[at : at + _READ_BYTES])

    async def receive(count: int) -> None:
        await parse(delivered, count, lambda message: Delivery(message, 0, 0.0))

    async def decoding(count: int) -> None:
        for _ in range(count):
            flow.decode_state(decode(arrived.data).state, None)

    async def handler(count: int) -> None:
        message = decode(body)
        state = flow.decode_state(message.state, None)
        call = flow.roles["solver"].handler
        for _ in range(count):
            await call(Row(message, state, 1, None))
            state.said.pop()

    async def encoding(count: int) -> None:
        message = decode(body)
        state = flow.decode_state(message.state, None)
        for _ in range(count):
            message.state = encode_state(state)
            encode(advance(message, "extractor"))

    async def publish(count: int) -> None:
        for n in range(count):
            its = fence_lines(n, family(_RUN, n)) + f"{HEADER_LEASE}: {_LEASE}\r\n"
            hpub(hop_subject(_RUN, "extractor", n, 6), "_INBOX.x.1", its, body)

    async def puback(count: int) -> None:
        await parse(confirmed, count, lambda message: confirmation(subject, message))

    async def ack(count: int) -> None:
        for _ in range(count):
            pub(_ACK, "+ACK")

    async def wake(count: int) -> None:
        loop = asyncio.get_running_loop()

        async def one(future: asyncio.Future[None]) -> None:
            await future

        for _ in range(count // 100):
            futures = [loop.create_future() for _ in range(100)]
            tasks = [loop.create_task(one(future)) for future in futures]
            await asyncio.sleep(0)
            for future in futures:
                future.set_result(None)
            await asyncio.gather(*tasks)

    return {
        "receive": receive,
        "decode": decoding,
        "handler": handler,
        "encode": encoding,
        "publish": publish,
        "puback": puback,
        "ack": ack,
        "wake": wake,
    }


async def _timed(stage: Stage, count: int) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        started = time.process_time()
        await stage(count)
        best = min(best, time.process_time() - started)
    return best / count * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(prog="stages", description="What each stage of a hop costs the worker.")
    parser.add_argument("--hops", type=int, default=20_000)
    given = parser.parse_args()
    if given.hops < 100:
        parser.error("--hops must be at least 100")
    found = {}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for name, stage in stages().items():
            found[name] = round(runner.run(_timed(stage, given.hops)), 2)
            print(f"{name:8} {found[name]:6.2f} us", flush=True)
    made = {
        "benchmark": "stages",
        "us_per_hop": found,
        "sum_us": round(sum(found.values()), 1),
        "body_bytes": len(_message()),
        "body_bytes_mean": round(
            sum(size for n in range(50) for size in sizes(_RUN, n)) / sum(len(sizes(_RUN, n)) for n in range(50))
        ),
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }
    print(msgspec.json.encode(made).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
