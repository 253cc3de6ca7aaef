"""The local broker against real nats-server processes: shared by all, found again, restarted on its port."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest

from matrix_bus.broker import Broker, find_server, local_broker, server_info
from matrix_bus.errors import BusUnavailable, BusUnsuitable, UsageError
from matrix_bus.service import Info, LocalService, free_port, port_is_free, state_dir

ENSURE = """
from matrix_bus.broker import local_broker
info = local_broker().ensure()
print(info.url, info.pid, info.started_by_us, flush=True)
"""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    """The user's shared broker, of a user whose state is in `tmp_path`."""
    monkeypatch.setenv("MATRIX_BUS_HOME", str(tmp_path / "home"))
    shared = local_broker()
    yield shared
    shared.stop()


def kill(info: Info, service: LocalService) -> None:
    """SIGKILL, and wait until it is gone."""
    os.kill(info.pid, signal.SIGKILL)
    with (service.home / "broker.pid").open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # granted when it is gone, an instant before its port is free
    while not port_is_free(int(info.url.rpartition(":")[2])):
        pass
    assert service.status() is None


# --- a private broker ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("own", ["", "3"])
def test_a_broker_takes_half_of_the_cores_or_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    monkeypatch.setenv("GOMAXPROCS", own) if own else monkeypatch.delenv("GOMAXPROCS", raising=False)
    with Broker(tmp_path / "broker") as broker:
        given = Path(f"/proc/{broker.pid}/environ").read_bytes().split(b"\0")
    assert f"GOMAXPROCS={own or max(1, (os.cpu_count() or 2) // 2)}".encode() in given


async def test_a_killed_broker_comes_back_on_its_port_with_its_data(broker: Broker) -> None:
    url, pid = broker.url, broker.pid
    client = await nats.connect(url)
    stream = client.jetstream()
    await stream.add_stream(name="S", subjects=["s.>"])
    for n in range(50):
        await stream.publish("s.x", str(n).encode())
    await client.close()
    broker.kill()
    with pytest.raises(BusUnavailable, match="start"):
        _ = broker.pid
    assert server_info(url) is None
    broker.start()
    assert broker.url == url
    assert broker.pid != pid
    client = await nats.connect(url)
    state = (await client.jetstream().stream_info("S")).state
    await client.close()
    assert (state.messages, state.last_seq) == (50, 50)


def test_restart_and_stop_and_start_keep_the_port(broker: Broker) -> None:
    url, pid = broker.url, broker.pid
    broker.restart()
    assert broker.pid != pid
    assert broker.start().url == url
    broker.stop()
    broker.stop()
    assert server_info(url) is None
    broker.start()
    assert server_info(url) is not None


def test_two_brokers_have_their_own_ports(broker: Broker, shared_broker: Broker) -> None:
    assert broker.url != shared_broker.url


def test_a_directory_with_odd_characters(tmp_path: Path) -> None:
    with Broker(tmp_path / 'a "b" é $HOME \\x') as broker:
        assert (server_info(broker.url) or {})["max_payload"] == 8 << 20
        assert (broker.directory / "jetstream").is_dir()


def test_a_broker_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(BusUnavailable, match="sync_interval"):
        Broker(tmp_path, sync_interval="soon").start()


# --- the user's shared broker -------------------------------------------------------------------------------


def test_ensure_starts_once_and_stop_stops(service: LocalService) -> None:
    assert service.status() is None
    assert service.stop() is False
    first = service.ensure()
    again = service.ensure()
    assert (first.started_by_us, again.started_by_us) == (True, False)
    assert (first.url, first.pid) == (again.url, again.pid)
    assert service.status() == again
    assert stat.S_IMODE(service.home.stat().st_mode) == 0o700
    assert service.stop() is True
    assert service.status() is None
    assert server_info(first.url) is None
    assert service.stop() is False
    assert service.ensure().url == first.url


def test_eight_processes_at_once_get_one_broker(service: LocalService) -> None:
    children = [subprocess.Popen([sys.executable, "-c", ENSURE], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    answers = [child.communicate(timeout=50)[0].split() for child in children]
    assert [child.returncode for child in children] == [0] * 8
    assert len({(url, pid) for url, pid, _ in answers}) == 1
    assert [started for *_, started in answers].count("True") == 1
    running = service.status()
    assert running is not None
    assert (running.url, str(running.pid)) == (answers[0][0], answers[0][1])


def test_it_outlives_its_starter_and_the_terminal(service: LocalService) -> None:
    starter = [sys.executable, "-c", ENSURE + "import signal; signal.pause()"]
    with subprocess.Popen(starter, stdout=subprocess.PIPE, text=True, start_new_session=True) as terminal:
        assert terminal.stdout is not None
        url, pid, _ = terminal.stdout.readline().split()
        os.killpg(terminal.pid, signal.SIGINT)  # as Ctrl-C does
        os.killpg(terminal.pid, signal.SIGKILL)
    assert os.getsid(int(pid)) not in (os.getsid(0), terminal.pid)
    assert service.ensure() == Info(url, int(pid))


async def test_a_killed_one_is_replaced_on_its_port_over_its_data(service: LocalService) -> None:
    first = service.ensure()
    client = await nats.connect(first.url)
    await client.jetstream().add_stream(name="S", subjects=["s.>"])
    await client.jetstream().publish("s.x", b"kept")
    await client.close()
    kill(first, service)
    second = service.ensure()
    assert second.url == first.url
    assert second.pid != first.pid
    assert second.started_by_us
    client = await nats.connect(second.url)
    assert (await client.jetstream().stream_info("S")).state.messages == 1
    await client.close()


def test_another_port_if_the_old_one_is_taken(service: LocalService) -> None:
    first = service.ensure()
    kill(first, service)
    with socket.create_server(("127.0.0.1", int(first.url.rpartition(":")[2]))):
        second = service.ensure()
    assert second.url != first.url
    assert service.status() is not None


def test_another_broker_on_the_old_port_is_not_mistaken(service: LocalService, tmp_path: Path) -> None:
    first = service.ensure()
    kill(first, service)
    with Broker(tmp_path / "other", port=int(first.url.rpartition(":")[2])) as other:
        assert service.status() is None
        assert service.stop() is False
        second = service.ensure()
        assert second.url != other.url
        assert other.pid > 0


@pytest.mark.parametrize("content", ["", "{", '{"port": 1}', "[]"])
def test_an_unreadable_record_is_started_over(service: LocalService, content: str) -> None:
    (service.home / "broker.json").write_text(content)
    (service.home / "broker.pid").write_text("x")
    assert service.status() is None
    assert service.ensure().started_by_us


def test_a_stale_pid_is_never_signalled(service: LocalService) -> None:
    """The pid of a dead broker may belong to somebody else by now: here, to this very process."""
    kill(service.ensure(), service)
    record = json.loads((service.home / "broker.json").read_text())
    (service.home / "broker.json").write_text(json.dumps({**record, "pid": os.getpid()}))
    (service.home / "broker.pid").write_text(str(os.getpid()))
    assert service.status() is None
    assert service.stop() is False
    assert service.ensure().started_by_us


def test_one_whose_starter_died_half_way_is_adopted(service: LocalService) -> None:
    first = service.ensure()
    record = json.loads((service.home / "broker.json").read_text())
    (service.home / "broker.json").write_text(json.dumps({**record, "pid": 0, "started": ""}))
    again = service.ensure()
    assert (again.pid, again.started_by_us) == (first.pid, False)
    assert service.stop() is True


def test_one_that_hangs_is_reported_and_can_be_stopped(service: LocalService) -> None:
    info = service.ensure()
    os.kill(info.pid, signal.SIGSTOP)
    hasty = local_broker(service.home)
    hasty._ready_timeout_s = hasty._grace_s = 0.2
    with pytest.raises(UsageError, match=f"pid {info.pid}.* does not answer"):
        hasty.ensure()
    assert hasty.stop() is True
    assert service.ensure().url == info.url


def test_a_start_that_fails_shows_the_log(tmp_path: Path) -> None:
    failing = LocalService(
        "failing",
        argv=lambda port, identity: ["/bin/sh", "-c", "echo the reason >&2; exit 3"],
        url=lambda port: f"nats://127.0.0.1:{port}",
        healthy=lambda url, identity: False,
        home=tmp_path,
    )
    with pytest.raises(UsageError, match=r"(?s)ended at once.*failing.log.*the reason"):
        failing.ensure()
    assert failing.status() is None


def test_the_state_directory_must_be_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MATRIX_BUS_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UsageError, match="MATRIX_BUS_HOME"):
        state_dir()
    monkeypatch.delenv("MATRIX_BUS_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_dir() == tmp_path / "xdg" / "matrix-bus"


# --- the binary ---------------------------------------------------------------------------------------------


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is the only place where a nats-server can be."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))
    monkeypatch.setattr(sys, "executable", str(place / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(place))
    return place


def test_without_a_binary_the_advice_is_to_install_it(only: Path, service: LocalService) -> None:
    with pytest.raises(BusUnsuitable, match=r"none is installed.*matrix-bus\[local\]"):
        find_server()
    with pytest.raises(BusUnsuitable):
        service.ensure()


@pytest.mark.parametrize("version", ["2.9.10", "2.15.0", "3.0.0"])
def test_an_unsuitable_version_is_named(only: Path, version: str) -> None:
    binary = only / "nats-server"
    binary.write_text(f"#!/bin/sh\necho nats-server: v{version}\n")
    binary.chmod(0o755)
    with pytest.raises(BusUnsuitable, match=rf"bin/nats-server is {version}.*matrix-bus\[local\]"):
        find_server()


@pytest.mark.parametrize("version", ["2.15.1", "2.16.0-RC.1", "2.100.3"])
def test_a_suitable_version_is_taken(only: Path, version: str) -> None:
    binary = only / "nats-server"
    binary.write_text(f"#!/bin/sh\necho nats-server: v{version}\n")
    binary.chmod(0o755)
    assert find_server() == binary


def test_a_binary_that_does_not_run_is_unsuitable(only: Path) -> None:
    (only / "nats-server").write_bytes(b"\x7fELF")
    (only / "nats-server").chmod(0o755)
    with pytest.raises(BusUnsuitable, match="no known version"):
        find_server()


def test_something_else_on_the_port_is_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert server_info(f"nats://127.0.0.1:{mute.getsockname()[1]}", timeout_s=0.1) is None
    assert server_info(f"nats://127.0.0.1:{free_port()}") is None
