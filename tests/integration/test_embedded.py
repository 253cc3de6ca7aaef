"""What a host process notices of matrix-bus inside it: nothing, unless it asks. And the blocking client."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import matrix_bus as mb
from matrix_bus import catalog, registry
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.errors import BusUnavailable, ConfigError, RunError
from tests.helpers import unique, working
from tests.trip import trip

UNWANTED = ("typer", "rich", "hydra", "omegaconf", "structlog", "openai")

HOST = """
import asyncio, logging, sys
from pathlib import Path
from matrix_bus.broker import Broker
{before}
import matrix_bus as mb
from matrix_bus.worker import Worker

class Draft(mb.State):
    topic: str

flow = mb.Workflow("draft", state=Draft, start="write")
flow.code_hash = "of-this-test"

@flow.role
async def write(row: mb.Row[Draft]) -> mb.Outcome:
    return mb.success()

async def work(broker):
    async with mb.connect(broker.url) as client, asyncio.timeout(30):
        worker = Worker(client._bus, [flow])
        working = asyncio.create_task(worker.run())
        await (await client.submit(flow, [{{"topic": "x"}}] * 20)).wait()
        made = await client.submit("draft", [{{"topic": "x"}}] * 20 + [{{"topc": 1}}], config={{}})
        found = 0
        async for outcome in made.outcomes():
            found += 1
            if found == 10:
                broker.kill()
                await asyncio.to_thread(broker.start)
        worker.stop()
        await working
    assert found == 20, found

with Broker(Path(sys.argv[1])) as broker:
    asyncio.run(work(broker))
    with mb.connect_blocking(broker.url) as bus:
        assert len(bus.runs()) == 2
{after}
"""


def host(tmp_path: Path, before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    """A program that submits, is a worker, follows, and sees its broker die, with what it says."""
    code = HOST.format(before=before, after=after)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "broker")],
        check=False,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_nothing_is_said_and_nothing_is_set_up(tmp_path: Path) -> None:
    after = f"""
root = logging.getLogger()
assert root.handlers == [] and root.level == logging.WARNING, root.handlers
for name in ("nats", "asyncio", "aiohttp"):
    assert logging.getLogger(name).level == logging.NOTSET and not logging.getLogger(name).handlers, name
assert logging.getLogger("matrix_bus").level == logging.NOTSET
loaded = [name for name in {UNWANTED!r} if name in sys.modules]
assert not loaded, loaded
assert type(asyncio.get_event_loop_policy()).__module__.startswith("asyncio.")
"""
    done = host(tmp_path, after=after)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_host_with_handlers_gets_the_records(tmp_path: Path) -> None:
    before = """
class Keep(logging.Handler):
    kept = []
    def emit(self, record):
        self.kept.append(record)
logging.getLogger().addHandler(Keep())
logging.getLogger("matrix_bus").setLevel(logging.INFO)
"""
    after = """
[record] = [r for r in Keep.kept if r.name == "matrix_bus.bus" and "bus.disconnected" in r.getMessage()][:1]
assert record.levelno == logging.WARNING
assert record.getMessage() == f"bus.disconnected url='{broker.url}'", record.getMessage()
assert record.matrix_bus == {"event": "bus.disconnected", "url": broker.url}
assert record.funcName == "_on_disconnect", record.funcName
assert any(r.name == "matrix_bus.worker" and "worker.serving" in r.getMessage() for r in Keep.kept)
assert not [r for r in Keep.kept if r.name.startswith("nats")]
"""
    assert host(tmp_path, before, after).stderr == ""


def test_a_host_that_configured_structlog_keeps_its_configuration(tmp_path: Path) -> None:
    before = """
import structlog
def refuse(*_):
    raise SystemExit("the host's structlog was used")
structlog.configure(processors=[refuse])
kept = structlog.get_config()
"""
    done = host(tmp_path, before, "assert structlog.get_config() == kept")
    assert (done.stdout, done.stderr) == ("", "")


def test_our_own_processes_log_to_stderr_as_ever() -> None:
    code = """
from matrix_bus import telemetry
log = telemetry.logger("run")
telemetry.configure_logs(level="info", json=True)
telemetry.current_hop.set(("r", 3, 2, "writer"))
log.info("run.said", reason="so", row=4)
log.debug("run.unsaid")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("run.broke")
telemetry.configure_logs()
log.info("run.unsaid")
log.warning("run.warned", reason="a b")
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=50)
    said, broke, warned = done.stderr.splitlines()
    assert done.stdout == ""
    found = json.loads(said)
    assert found.pop("timestamp")
    hop = {"run": "r", "row": 4, "hop": 2, "role": "writer"}
    assert found == {"event": "run.said", "level": "info", "reason": "so", **hop}
    assert '"level": "error"' in broke and "ZeroDivisionError" in broke
    assert "[warning  ] run.warned" in warned and "reason='a b'" in warned


# --- the blocking client ----------------------------------------------------------------------------------------


@pytest.fixture
def served(shared_broker: Broker) -> Iterator[tuple[str, mb.Workflow[Any]]]:
    """An address and a workflow that is served there, by a worker on a loop in another thread."""
    flow = trip()
    up, leave = threading.Event(), threading.Event()

    async def serve() -> None:
        async with working(shared_broker.url, flow), await Bus.connect(shared_broker.url) as bus:
            await catalog.announce(bus, catalog.describe(flow))
            up.set()
            await asyncio.to_thread(leave.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert up.wait(20)
    yield shared_broker.url, flow
    leave.set()
    thread.join()


def test_the_blocking_client_does_all_that_the_other_does(served: tuple[str, mb.Workflow[Any]]) -> None:
    url, flow = served
    with mb.connect_blocking(url) as bus:
        made = bus.submit(flow.name, [{"x": 0}, {"x": "no"}, {"x": 2}], settings={"trials": 2})
        assert sorted(o.id for o in made.outcomes()) == ["0", "0", "2", "2"]
        assert made.wait().done
        assert made.status().total == 4
        assert made.rejected.count == 1
        assert bus.run(made.id).workflow == flow.name
        assert made.id in {run.id for run in bus.runs()}
        assert flow.name in {info.name for info in bus.workflows()}
        with pytest.raises(RunError, match="no run 'none'"):
            bus.run("none")
        with pytest.raises(RunError, match="nothing to cancel"):
            made.cancel()
        for _ in made.outcomes():
            break
        assert len([*made.outcomes()]) == 4
        left = made.outcomes()
        next(left)
    left.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("matrix-bus-client", "matrix-bus-rows"))]
    for call in (made.status, bus.runs, lambda: next(made.outcomes())):
        with pytest.raises(BusUnavailable, match="the client is closed"):
            call()


async def test_it_works_where_a_loop_runs_already(served: tuple[str, mb.Workflow[Any]]) -> None:
    url, flow = served
    with mb.connect_blocking(url) as bus:
        assert len([*bus.submit(flow, ({"x": x} for x in range(5))).outcomes()]) == 5


def test_it_says_why_it_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MATRIX_BUS_SERVER", raising=False)
    with pytest.raises(ConfigError, match="no broker is named"), mb.connect_blocking():
        pass
    with pytest.raises(BusUnavailable), mb.connect_blocking("nats://127.0.0.1:1"):
        pass


def test_an_error_in_the_block_comes_out_as_itself(shared_broker: Broker) -> None:
    with pytest.raises(KeyError, match="mine"), mb.connect_blocking(shared_broker.url):
        raise KeyError("mine")


def test_a_call_in_another_thread_ends_when_the_client_is_closed(shared_broker: Broker) -> None:
    caught: list[BaseException] = []

    def wait(made: mb.BlockingRun) -> None:
        try:
            made.wait()
        except BaseException as error:
            caught.append(error)

    with mb.connect_blocking(shared_broker.url) as bus:
        made = bus.submit(trip(), [{"x": 1}])
        thread = threading.Thread(target=wait, args=(made,))
        thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(caught[0], BusUnavailable)


CTRL_C = """
import sys, time
import matrix_bus as mb

def rows():
    for x in range(10**9):
        if x == 200:
            print("under way", flush=True)
        if x > 200:
            time.sleep(0.01)
        yield {"x": x}

try:
    with mb.connect_blocking(sys.argv[1]) as bus:
        bus.submit(sys.argv[2], rows(), run=sys.argv[3])
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


async def test_ctrl_c_ends_a_call_and_closes_cleanly(bus: Bus) -> None:
    flow, run = trip(), unique("r")
    await catalog.announce(bus, catalog.describe(flow))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", CTRL_C, bus.url, flow.name, run,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.readline() == b"under way\n"
    process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (out, err, process.returncode) == (b"interrupted\n", b"", 0)
    assert (await registry.require(bus, run)).total is None
