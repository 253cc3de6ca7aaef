"""Model servers as child processes: started on free ports, waited for, brought back when they crash, drained."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from matrix_bus.errors import UsageError
from matrix_bus.service import free_port

from .backends import Launch

_POLL_S = 0.25
_LOOK_S = 2.0
_LOOK_TIMEOUT_S = 10.0
_MISSED = 5
"""Looks in a row without an answer, a minute in all, after which a server that still runs is started anew. One that
is only drowned in work answers sooner than that."""
_FIRST_S, _LONGEST_S = 1.0, 60.0
_GRACE_S = 10.0
_TAIL_LINES = 40
"""vLLM says a lot after what matters."""
_KEEPER = Path(__file__).with_name("keeper.py")

# A proxy from the environment, as clusters have one, must not answer a look at our own server.
_opener = build_opener(ProxyHandler({}))


class Server:
    """One replica, kept alive by `run` until that is cancelled."""

    def __init__(self, launch: Launch, log: Path, *, host: str = "127.0.0.1", ready_within_s: float = 1800.0) -> None:
        self.name = launch.name
        self.log = log
        self._launch = launch
        self._host = host
        self._ready_within_s = ready_within_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0
        self.port = free_port()

    async def run(self, on_change: Callable[[bool], None], say: Callable[[str], None]) -> None:
        """Starts the server and brings it back whenever it dies; `on_change` is told when it answers, and when not.

        Raises `UsageError`, with the end of its log, if it ends before it ever answered: then it is the command.
        """
        wait_s, answered = _FIRST_S, False
        try:
            while True:
                self._start()
                why = await self._until_ready()
                if why and not answered:
                    raise UsageError(f"the server of {self.name} {why}; the end of {self.log}:\n{self.tail()}")
                began = time.monotonic()
                if not why:
                    answered = True
                    on_change(True)
                    why = await self._until_dead()
                    on_change(False)
                await self.stop(0.0)
                wait_s = _FIRST_S if time.monotonic() - began > _LONGEST_S else min(_LONGEST_S, 2 * wait_s)
                again = f"starting it again in {wait_s:g} s"
                say(f"the server of {self.name} {why}, {again}; {self.log} ends:\n{self.tail()}")
                await asyncio.sleep(wait_s)
        finally:
            await self.stop(_GRACE_S)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to the server, and SIGKILL after the grace, or once it has ended, to all that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.poll() is None and grace_s > 0:
                with contextlib.suppress(BrokenPipeError):
                    os.write(process.stdin.fileno(), b".")
                deadline = time.monotonic() + grace_s
                while process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S / 5)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdin.close()
            process.stdout.close()
            process.wait()

    def tail(self) -> str:
        """The last lines of its log, of the last start alone."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_from)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])

    def _start(self) -> None:
        filled = [word.replace("{port}", str(self.port)).replace("{host}", self._host) for word in self._launch.words]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_KEEPER), *filled],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self._launch.environment},
                start_new_session=True,
            )

    async def _until_ready(self) -> str:
        """Empty once it answers, else why it does not."""
        deadline = time.monotonic() + self._ready_within_s
        while time.monotonic() < deadline:
            if why := self._ended():
                return why
            if await asyncio.to_thread(self._answers):
                return ""
            await asyncio.sleep(_POLL_S)
        return f"does not answer on port {self.port} after {self._ready_within_s:g} s"

    async def _until_dead(self) -> str:
        missed = 0
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(_POLL_S)
            if why := self._ended():
                return why
            if time.monotonic() - looked_at > _LOOK_S:
                missed = 0 if await asyncio.to_thread(self._answers) else missed + 1
                looked_at = time.monotonic()
                if missed >= _MISSED:
                    return f"has not answered {missed} times in a row"

    def _ended(self) -> str:
        process = self._process
        if process is None or process.poll() is None:
            return ""
        assert process.stdout is not None
        code = process.stdout.read().decode()
        return f"ended with exit code {code}" if code else "was killed together with its keeper"

    def _answers(self) -> bool:
        try:
            url = f"http://{self.local_host}:{self.port}/v1/models"
            with _opener.open(url, timeout=_LOOK_TIMEOUT_S) as reply:
                return bool(reply.status == 200)
        except HTTPError as error:
            return error.code < 500  # it wants a key, or has no such list: it is there
        except (OSError, HTTPException):
            return False

    @property
    def local_host(self) -> str:
        """By which it is reached from this machine."""
        return "127.0.0.1" if self._host == "0.0.0.0" else self._host  # noqa: S104 - compared, not bound
