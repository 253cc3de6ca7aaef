"""The example of a web service: a real broker, a real worker process, the service as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

import matrix_bus as mb
from matrix_bus.broker import Broker
from matrix_bus.service import free_port
from tests.acceptance.conftest import Shell
from tests.helpers import until

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "web_service.py"


@pytest.fixture
async def service(broker: Broker, shell: Shell, tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """The service, and a worker that has announced `walk`."""
    port = free_port()
    log = (tmp_path / "service.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE), str(port)],
        env={**shell.environment, "MATRIX_BUS_SERVER": broker.url},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    shell.start("worker", "--server", broker.url, "--workflow", str(shell.flow))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session, mb.connect(broker.url) as client:
        await until(lambda: _answers(session), "the service")
        await until(client.workflows, "the announcement")
        yield session
    process.send_signal(signal.SIGINT)
    code = await asyncio.to_thread(process.wait, 20)
    log.close()
    said = (tmp_path / "service.log").read_text()
    assert code == 0, said
    assert "Traceback" not in said and "matrix_bus" not in said, said


async def _answers(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/runs") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def _post(session: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, Any]:
    async with session.post(path, data=body) as response:
        return response.status, msgspec.json.decode(await response.read())


async def _get(session: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with session.get(path) as response:
        return response.status, msgspec.json.decode(await response.read())


async def test_rows_go_in_and_outcomes_come_out(service: aiohttp.ClientSession) -> None:
    body = b"".join(b'{"x": %d}\n' % x for x in range(30)) + b"{no\n"
    code, made = await _post(service, "/runs/walk?run=nightly", body)
    assert (code, made["run"], made["rejected"]) == (201, "nightly", 1)
    assert made["first"][0]["line"] == 31
    async with service.get("/runs/nightly/outcomes") as response:
        assert response.content_type == "application/x-ndjson"
        found = [msgspec.json.decode(line, type=mb.OutcomeRecord) async for line in response.content]
    assert sorted(int(o.id) for o in found) == list(range(30))
    assert {o.reason for o in found} == {"walked"}
    code, status = await _get(service, "/runs/nightly")
    assert (code, status["total"], status["outcomes"], status["state"]) == (200, 30, 30, "active")
    assert (await _get(service, "/runs"))[1] == [{"run": "nightly", "workflow": "walk"}]


async def test_mistakes_are_answered_with_what_to_do(service: aiohttp.ClientSession) -> None:
    code, said = await _post(service, "/runs/wolk", b'{"x": 1}')
    assert code == 400
    assert "did you mean 'walk'" in said["error"]
    code, said = await _post(service, '/runs/walk?config={"turns":3}', b'{"x": 1}')
    assert code == 400
    assert "no parameters" in said["error"]
    code, said = await _get(service, "/runs/none")
    assert code == 400
    assert "no run 'none'" in said["error"]


async def test_a_client_that_leaves_harms_nobody(service: aiohttp.ClientSession, broker: Broker) -> None:
    gate = asyncio.Event()

    async def upload() -> AsyncIterator[bytes]:
        for x in range(40):
            yield b'{"x": %d}\n' % x
        await gate.wait()

    uploading = asyncio.create_task(_post(service, "/runs/walk?run=long", upload()))
    async with mb.connect(broker.url) as client:
        await until(lambda: _has_outcomes(client, "long"), "rows of an upload that still goes on to be through")
        following = await service.get("/runs/long/outcomes")
        assert msgspec.json.decode(await following.content.readline())["run"] == "long"
        following.close()
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
        assert (await (await client.run("long")).status()).total is None
    code, _ = await _post(service, "/runs/walk?run=long", b"".join(b'{"x": %d}\n' % x for x in range(45)))
    assert code == 201
    async with service.get("/runs/long/outcomes") as response:
        assert len([line async for line in response.content]) == 45


async def _has_outcomes(client: mb.Client, run: str) -> bool:
    try:
        return (await (await client.run(run)).status()).outcomes > 0
    except mb.UsageError:
        return False
