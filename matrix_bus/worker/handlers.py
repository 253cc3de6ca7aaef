"""How a handler is called: on the loop, in a thread or in a process; with what it asked for."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import msgspec

from ..agent import Next, Outcome, Role, Row, Store, Workflow, encode_state, load_workflow
from ..errors import HandlerError, WorkerCrashed
from ..llm import LLM
from ..orchestrator import Orchestrator, decode, encode


class Executors:
    """Threads and processes for plain `def` handlers, started when first used."""

    def __init__(self, threads: int, processes: int) -> None:
        self._most_threads = threads
        self._threads: ThreadPoolExecutor | None = None
        self._places = asyncio.Semaphore(processes)
        self._idle: list[ProcessPoolExecutor] = []
        """Each of one process, so that one that has to be killed takes no other's call with it."""

    def in_thread(self, function: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._most_threads, thread_name_prefix="matrix-bus-handler")
        context = contextvars.copy_context()
        return asyncio.get_running_loop().run_in_executor(self._threads, context.run, function, *args)

    async def in_process(self, function: Callable[..., Any], *args: Any) -> Any:
        """Raises `WorkerCrashed` if the process died. Where this is cancelled, the process is killed: it may hang."""
        async with self._places:
            process = self._idle_process() or _new_process()
            usable = True
            try:
                return await asyncio.get_running_loop().run_in_executor(process, function, *args)
            except BrokenProcessPool:
                usable = False
                raise WorkerCrashed("the process of the handler died: killed, or out of memory?") from None
            except asyncio.CancelledError:
                usable = False
                raise
            finally:
                if usable:
                    self._idle.append(process)
                else:
                    _kill(process)

    def _idle_process(self) -> ProcessPoolExecutor | None:
        while self._idle:
            if not (process := self._idle.pop())._broken:
                return process
            _kill(process)  # it died while it waited, which is not the fault of the next row
        return None

    def close(self) -> None:
        """Waits for nobody: what still runs in a thread cannot be stopped."""
        for pool in (self._threads, *self._idle):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)


def _new_process() -> ProcessPoolExecutor:
    # spawn: a fork of a process with a running loop, threads and sockets is not safe
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list(pool._processes.values()):  # public as `kill_workers` from Python 3.14 on
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """In the child: a worker that is killed closes nothing, and its processes would wait for work for ever."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="matrix-bus-parent", daemon=True).start()


class Caller:
    """Calls one role's handler with the row and what it asked for."""

    def __init__(
        self,
        flow: Workflow[Any],
        role: Role,
        available: Mapping[Any, Any],
        executors: Executors,
        trials: int,
        store: Store | None = None,
    ) -> None:
        """`available` are the workflow's config and the resources, by their types."""
        self._flow = flow
        self._store = store
        self._role = role
        self._executors = executors
        self._trials = trials
        self._config = available.get(flow.config)
        self._llm_names = [name for name, kind in role.parameters if kind is LLM]
        self.wants_llm = bool(self._llm_names) and role.mode != "process"
        """Whether `begin` is to be given one."""
        self._fixed: dict[str, Any] = {}
        if role.mode != "process":
            self._fixed = {name: available[kind] for name, kind in role.parameters if kind is not LLM}

    def begin(self, message: Orchestrator, llm: LLM | None) -> tuple[Row[Any] | None, Awaitable[Any]]:
        """(the row, None where it is in another process; what is awaited for `end`). Raises `RowError`.

        Two plain functions, so that a handler at work has one coroutine less around it: there may be 50 000 of them.
        """
        role = self._role
        if role.mode == "process":
            config = msgspec.json.encode(self._config)
            return None, self._executors.in_process(
                _call_in_process,
                self._flow.spec,
                self._flow.code_hash,
                role.name,
                encode(message),
                self._trials,
                config,
            )
        row: Row[Any] = Row(message, self._flow.decode_state(message.state, self._store), self._trials, self._store)
        arguments = self._fixed | dict.fromkeys(self._llm_names, llm) if self._llm_names else self._fixed
        if role.mode == "async":
            return row, role.handler(row, **arguments)
        return row, self._executors.in_thread(lambda: role.handler(row, **arguments))

    def end(self, row: Row[Any] | None, returned: Any) -> tuple[Next | Outcome, bytes]:
        """(what the handler decided, the state as it left it).

        Raises `HandlerError` if it returned no decision that holds.
        """
        result, state = returned if row is None else (returned, encode_state(row.state))
        return self._role.decided(result, self._flow.roles), state


def _call_in_process(
    spec: str, code_hash: str, role_name: str, body: bytes, trials: int, config_json: bytes
) -> tuple[Any, bytes]:
    """In the child: loads the workflow once, then calls the handler like any other."""
    flow = load_workflow(spec)
    if flow.code_hash != code_hash:
        raise HandlerError(f"{spec} was edited after this worker had loaded it: restart the worker")
    message = decode(body)
    row: Row[Any] = Row(message, flow.decode_state(message.state), trials)
    role = flow.roles[role_name]
    available = _available_here(flow, role, config_json)
    result = role.handler(row, **{name: available[kind] for name, kind in role.parameters})
    return result, encode_state(row.state)


_open_here: dict[tuple[str, bytes], dict[Any, Any]] = {}
"""In the child: config and resources by their types, for each workflow and its parameters."""
_closing = contextlib.ExitStack()


def _available_here(flow: Workflow[Any], role: Role, config_json: bytes) -> dict[Any, Any]:
    """In the child: what the handler may ask for; resources stay open until the process ends."""
    if not _open_here:
        atexit.register(_closing.close)
    key = (flow.code_hash, config_json)
    if key not in _open_here:
        _open_here[key] = {flow.config: flow.parse_config(msgspec.json.decode(config_json) or {})}
    available = _open_here[key]
    for resource in flow.needed([kind for _, kind in role.parameters]):
        if resource.kind not in available:
            available[resource.kind] = _closing.enter_context(resource.open_here(available))
    return available
