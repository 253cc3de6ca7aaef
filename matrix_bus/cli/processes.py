"""Commands that run processes: worker, broker."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Annotated

import typer

from ..agent import installed_workflows, load_workflow
from ..bus import Bus
from ..errors import BusUnavailable, UsageError, WorkflowError
from ..telemetry import configure_logs
from . import app
from .common import LogJson, LogLevel, Server, broker_url, embedded_model, go, relax_collector, say

_RESTART_WAIT_S = 1.0
_END_S = 5.0


class Action(enum.StrEnum):
    """What to do with a local service."""

    start = "start"
    stop = "stop"
    status = "status"


@app.command()
def worker(
    role: Annotated[
        list[str] | None, typer.Option("--role", "-r", help="Serve this role only; repeatable. Default: all.")
    ] = None,
    workflow: Annotated[
        list[str] | None,
        typer.Option("--workflow", "-w", help="A workflow to serve; repeatable. Default: all installed ones."),
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Hops in flight per role and process.")] = 256,
    procs: Annotated[int, typer.Option("--procs", min=1, help="Worker processes.")] = 1,
    grace_s: Annotated[float, typer.Option("--grace-s", min=0, help="On SIGTERM, time for handlers to finish.")] = 10.0,
    metrics_port: Annotated[int, typer.Option("--metrics-port", help="Serve Prometheus metrics on loopback.")] = 0,
    server: Server = "",
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
) -> None:
    """Serve roles of every active run until SIGTERM or Ctrl-C.

    Start as many as you like, before or after submitting, on any machine that reaches the broker. On SIGTERM or
    Ctrl-C it pulls no more, finishes what fits into the grace period and hands the rest back; a second signal hands
    back at once. Killing it loses nothing.
    """
    configure_logs(level=log_level, json=log_json)
    if procs > 1:
        _supervise(procs)
        return
    flows = [load_workflow(spec) for spec in (workflow or installed_workflows())]
    known = sorted({name for flow in flows for name in flow.roles})
    for name in role or []:
        if name not in known:
            raise WorkflowError(f"no role {name!r} in {', '.join(f.name for f in flows)}: there are {', '.join(known)}")
    url = broker_url(server)
    if metrics_port:
        from ..metrics import serve_metrics

        serve_metrics(metrics_port)

    async def work() -> None:
        from ..worker import Worker, garbage

        bus = await _connect_patiently(url)
        async with _without_stragglers(), bus:
            serving = Worker(bus, flows, roles=role or [], slots=slots, grace_s=grace_s, embedded_model=embedded_model)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, serving.stop)
            say(f"worker of {', '.join(f.name for f in flows)}: {', '.join(role or known)} · broker {bus.url}")
            relax_collector()  # once more, with all that was imported for it
            collecting = loop.create_task(garbage.pace(lambda: serving.holds))
            await serving.run()
            collecting.cancel()
            for number in (signal.SIGTERM, signal.SIGINT):  # everything is handed back: one more changes nothing
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)

    go(work())


@contextlib.asynccontextmanager
async def _without_stragglers() -> AsyncIterator[None]:
    """Ends the process soon after the block, although a thread still runs: Python would wait for it.

    Nothing can stop a handler that hangs in a thread; its hop is handed back, and nobody waits for what it returns.
    """
    code = 1
    try:
        yield
        code = 0
    finally:
        ending = threading.Timer(_END_S, os._exit, [code])
        ending.daemon = True
        ending.start()
        sys.stdout.flush()  # of handlers that print


async def _connect_patiently(url: str) -> Bus:
    """A worker may be started before its broker."""
    said = False
    while True:
        try:
            return await Bus.connect(url, name="matrix-bus worker")
        except BusUnavailable as error:
            if not said:
                say(f"{error}; waiting for it")
                said = True
            await asyncio.sleep(1.0)


def _supervise(procs: int) -> None:
    """Runs the same command `procs` times with one process each, restarting those that die."""
    words = sys.argv[1:]
    at = next(i for i, word in enumerate(words) if word.startswith("--procs"))
    del words[at : at + (1 if "=" in words[at] else 2)]
    command = [sys.executable, "-m", "matrix_bus", *words]
    stopping = False
    children = [subprocess.Popen(command, start_new_session=True) for _ in range(procs)]

    def stop(number: int, _: object) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopping:
        for index, child in enumerate(children):
            code = child.poll()
            if code is not None and code == 2:
                stop(signal.SIGTERM, None)  # a usage error: the child has said it, all others have it too
            elif code is not None and not stopping:
                say(f"worker process {child.pid} ended with exit code {code}: starting another")
                children[index] = subprocess.Popen(command, start_new_session=True)
        time.sleep(_RESTART_WAIT_S)
    codes = [child.wait() for child in children]
    if 2 in codes:
        sys.exit(2)


@app.command()
def broker(
    action: Annotated[Action, typer.Argument(help="What to do with it.")] = Action.start,
) -> None:
    """Your local JetStream broker, shared by your terminals: start (default), stop, status.

    Commands start it by themselves when no --server is given. Its data stays on disk when it stops.
    """
    from ..broker import local_broker

    service = local_broker()
    local_service("broker", action, service)


def local_service(name: str, action: Action, service: object) -> None:
    """Starts, stops or shows a service that the user's terminals share."""
    from ..service import LocalService

    assert isinstance(service, LocalService)
    if action is Action.start:
        info = service.ensure()
        print(f"the local {name} {'started' if info.started_by_us else 'runs'} at {info.url} (pid {info.pid})")
    elif action is Action.stop:
        print(f"the local {name} {'is stopped' if service.stop() else 'was not running'}")
    elif (status := service.status()) is not None:
        print(f"the local {name} runs at {status.url} (pid {status.pid}), log {service.log}")
    else:
        raise UsageError(f"the local {name} is not running")
