"""A service of which each user has one, started detached by whoever needs it first, shared by all terminals.

Three files in the state directory carry it, for a service called `broker`:

- `broker.lock` is held while somebody starts or stops the service, so that ten starters make one service.
- `broker.pid` is locked by the service itself for as long as it lives (it inherits the open file), so whether
  it runs is the kernel's word: no pid reuse, and no starter that died half-way, can make it wrong.
- `broker.json` says where it listens; kept after its death, because clients reconnect to the old address.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .errors import UsageError

_LOG_LIMIT_BYTES = 4 << 20
_POLL_S = 0.02
_PORT_S = 1.0  # the kernel closes a dead server's lock before its socket

# The outer shell lets go of the service, so that init reaps it. The inner one notes its pid before it becomes
# the service, so that it can be found and stopped even if whoever started it dies at this moment.
_DETACH = '"$@" >&2 & echo $!'
_NOTE_PID = 'echo $$ >"$0" && exec "$@"'


@dataclass(frozen=True)
class Info:
    """A running service: its address, its process, and whether this call of `ensure` started it."""

    url: str
    pid: int
    started_by_us: bool = False


@dataclass(frozen=True)
class _Record:
    """The content of `<name>.json`. `started` is the kernel's start time of the process, "" where unknown."""

    identity: str
    port: int
    url: str
    pid: int = 0
    started: str = ""


def state_dir() -> Path:
    """The user's state directory, created with mode 0700: `$MATRIX_BUS_HOME`, or `matrix-bus` in XDG's.

    Raises `UsageError` if it cannot be created.
    """
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    home = Path(os.environ.get("MATRIX_BUS_HOME") or Path(base) / "matrix-bus").absolute()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the state directory {home} cannot be used ({error.strerror}): set MATRIX_BUS_HOME to another"
        ) from None
    return home


def free_port() -> int:
    """A loopback port that nobody listens on at the moment; the caller must be ready to try another one.

    Below the kernel's ephemeral range (32768 on Linux): there, an outgoing connection could take the port
    while the service is down, even the reconnect attempt of its own client (a TCP self-connect).
    """
    while not port_is_free(port := random.randrange(20_000, 32_000)):
        pass
    return port


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def log_tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log file, "(empty)" if there are none."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:]) or "(empty)"


class LocalService:
    """One service of the user's, found by its name in the state directory. All methods block."""

    def __init__(
        self,
        name: str,
        *,
        argv: Callable[[int, str], Sequence[str]],
        url: Callable[[int], str],
        healthy: Callable[[str, str], bool],
        home: Path | None = None,
        ready_timeout_s: float = 60.0,
        grace_s: float = 10.0,
    ) -> None:
        """Describe the service; nothing is started.

        `argv(port, identity)` is its command line: it must listen on that loopback port or exit, and show
        `identity` to whoever asks. `url(port)` is its address. `healthy(url, identity)` says whether that
        very service answers there, in about two seconds at most and without raising. `home` defaults to
        `state_dir()`.
        """
        self.name = name
        self.home = home or state_dir()
        self.log = self.home / f"{name}.log"
        self._argv = argv
        self._url = url
        self._healthy = healthy
        self._ready_timeout_s = ready_timeout_s
        self._grace_s = grace_s
        self._lock_file = self.home / f"{name}.lock"
        self._pid_file = self.home / f"{name}.pid"
        self._record_file = self.home / f"{name}.json"

    def status(self) -> Info | None:
        """The running service, or None if none runs or it does not answer."""
        record = self._read()
        if record is None or not self._alive():
            return None
        return Info(record.url, self._pid()) if self._healthy(record.url, record.identity) else None

    def ensure(self) -> Info:
        """The running service, started if there is none, on its old port if that is free.

        Takes milliseconds if it runs; else as long as it takes to start. Raises `UsageError` with the end of
        its log if it does not come up, and what `argv` raises if it cannot be started at all.
        """
        info = self.status()
        if info is not None:
            return info
        with self._locked():
            record = self._read()
            if not self._alive():
                return self._start(record)
            if record is not None and self._wait_ready(record):
                return self._note(record, self._pid())
            if not self._alive():
                return self._start(record)
            raise UsageError(
                f"{self._which(self._pid())} runs but does not answer; its log is {self.log}. "
                f"Wait or stop it; if it runs on another machine or in a container, set MATRIX_BUS_HOME to a "
                f"directory of this machine's own"
            )

    def stop(self) -> bool:
        """Stop the service: SIGTERM, and SIGKILL after the grace. False if none runs.

        Raises `UsageError` if the process is not ours to stop (it runs on another machine or in a container).
        """
        with self._locked():
            if not self._alive():
                return False
            pid = self._pid()
            record = self._read()
            started = record.started if record is not None and record.pid == pid else ""
            if pid <= 1 or (started and _start_time(pid) not in ("", started)):
                raise UsageError(
                    f"{self._which(pid)} does not run here but on another machine or in a container that "
                    f"shares {self.home}: stop it there"
                )
            for signum in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.kill(pid, signum)
                except OSError as error:
                    if self._alive():
                        raise UsageError(f"{self._which(pid)} cannot be stopped: {error.strerror}") from None
                if _within(self._grace_s, lambda: not self._alive()):
                    if record is not None:
                        _within(_PORT_S, lambda: port_is_free(record.port))
                    return True
            raise UsageError(f"{self._which(pid)} survived SIGKILL for {self._grace_s} s")

    def _which(self, pid: int) -> str:
        return f"the local {self.name} (pid {pid})"

    def _start(self, last: _Record | None) -> Info:
        identity = last.identity if last else f"matrix-bus-{self.name}-{secrets.token_hex(6)}"
        keep = last is not None and _within(_PORT_S, lambda: port_is_free(last.port))
        port = last.port if last and keep else free_port()
        for _ in range(5):
            record = _Record(identity, port, self._url(port))
            self._write(record)  # before it starts: should we die meanwhile, the next one finds it by its port
            pid = self._spawn(self._argv(port, identity))
            if self._wait_ready(record):
                return replace(self._note(record, pid), started_by_us=True)
            if self._alive() or port_is_free(port):
                break
            port = free_port()  # somebody else took it in between
        state = "does not answer" if self._alive() else "ended at once"
        raise UsageError(f"the local {self.name} was started but {state}; the end of {self.log}:\n{log_tail(self.log)}")

    def _spawn(self, argv: Sequence[str]) -> int:
        with self._pid_file.open("a") as held, self.log.open("ab") as log:
            if log.tell() > _LOG_LIMIT_BYTES:
                log.truncate(0)
            fcntl.flock(held, fcntl.LOCK_EX)  # waits at most for somebody who is looking whether it is held
            held.truncate(0)
            done = subprocess.run(
                ["/bin/sh", "-c", _DETACH, "sh", "/bin/sh", "-c", _NOTE_PID, str(self._pid_file), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.home,
                pass_fds=[held.fileno()],  # what keeps it locked from now on
                start_new_session=True,  # out of reach of Ctrl-C and of the terminal's end
                check=True,
            )
        return int(done.stdout)

    def _wait_ready(self, record: _Record) -> bool:
        """Whether it answered before it died or the time was up."""
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline and self._alive():
            if self._healthy(record.url, record.identity):
                return True
            time.sleep(_POLL_S)
        return False

    def _alive(self) -> bool:
        """Whether the service holds its lock. Shared, so that two who look do not take each other for it."""
        try:
            with self._pid_file.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _pid(self) -> int:
        try:
            return int(self._pid_file.read_text())
        except (OSError, ValueError):
            return 0

    def _read(self) -> _Record | None:
        try:
            return _Record(**json.loads(self._record_file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None  # absent, or written by another version: nothing that a fresh start does not mend

    def _write(self, record: _Record) -> None:
        temporary = self._record_file.with_suffix(".json.new")  # one writer: we hold the lock
        temporary.write_text(json.dumps(asdict(record)))
        temporary.replace(self._record_file)

    def _note(self, record: _Record, pid: int) -> Info:
        self._write(replace(record, pid=pid, started=_start_time(pid)))
        return Info(record.url, pid)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock_file.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _within(timeout_s: float, condition: Callable[[], bool]) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _start_time(pid: int) -> str:
    """Clock ticks after boot at which the process started; "" where there is no /proc, or no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""
