"""The client for scripts and notebooks: the same calls, blocking, over an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from typing import Any, TypeVar

from msgspec import Struct

from ..agent import Workflow
from ..catalog import WorkflowInfo
from ..config import RunConfig
from ..dataset import Rejected
from ..errors import BusUnavailable
from ..orchestrator import OutcomeRecord
from .client import Client, connect
from .handle import Rejections, Run, Status
from .rows import Rows

T = TypeVar("T")


@contextlib.contextmanager
def connect_blocking(
    url: str | None = None, *, name: str = "matrix-bus client", start_broker: bool = False
) -> Iterator[BlockingClient]:
    """`connect` for code without an event loop, and for notebooks, whose loop is left alone.

    Takes and raises what `connect` does.
    """
    loop = _Thread()
    try:
        yield BlockingClient(loop, loop.start(url, name, start_broker))
    finally:
        loop.stop()


class _Thread:
    """An event loop in a daemon thread, and the client that lives on it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = threading.Event()
        self._leave = asyncio.Event()
        self._client: concurrent.futures.Future[Client] = concurrent.futures.Future()
        self._thread: threading.Thread | None = None

    def start(self, url: str | None, name: str, start_broker: bool) -> Client:
        """The client, connected."""

        async def live() -> None:
            self._loop = asyncio.get_running_loop()
            self._running.set()
            try:
                async with connect(url, name=name, start_broker=start_broker) as client:
                    self._client.set_result(client)
                    await self._leave.wait()
            except BaseException as error:
                if self._client.done():
                    raise
                self._client.set_exception(error)

        self._thread = threading.Thread(target=lambda: asyncio.run(live()), name="matrix-bus-client", daemon=True)
        self._thread.start()
        return self._client.result()

    def stop(self) -> None:
        """Closes the client, then the loop; calls of other threads that still wait get `BusUnavailable`."""
        if self._thread is None:
            return
        self._running.wait()
        loop, self._loop = self._loop, None
        assert loop is not None
        with contextlib.suppress(RuntimeError):  # it has ended by itself: it could not connect
            loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it on the loop; Ctrl-C cancels it there."""
        try:
            if self._loop is None:
                raise RuntimeError
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise BusUnavailable("the client is closed: its `with` block has ended") from None
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise BusUnavailable("the client was closed during the call") from None
        except BaseException:
            future.cancel()
            raise


class BlockingClient:
    """A connection to the bus, made by `connect_blocking`. Threads may share it."""

    def __init__(self, loop: _Thread, client: Client) -> None:
        self._loop = loop
        self._client = client

    def submit(
        self,
        workflow: str | Workflow[Any],
        rows: Rows,
        *,
        run: str = "",
        config: Mapping[str, Any] | Struct | None = None,
        settings: RunConfig | Mapping[str, Any] | None = None,
        on_reject: Callable[[Rejected], None] | None = None,
        shard: str = "",
    ) -> BlockingRun:
        """As `Client.submit`. Iterators are pulled, and `on_reject` is called, in threads other than the caller's."""
        submitted = self._client.submit(
            workflow, rows, run=run, config=config, settings=settings, on_reject=on_reject, shard=shard
        )
        return BlockingRun(self._loop, self._loop.call(submitted))

    def run(self, run: str) -> BlockingRun:
        """As `Client.run`."""
        return BlockingRun(self._loop, self._loop.call(self._client.run(run)))

    def runs(self) -> list[BlockingRun]:
        """As `Client.runs`."""
        return [BlockingRun(self._loop, run) for run in self._loop.call(self._client.runs())]

    def workflows(self) -> list[WorkflowInfo]:
        """As `Client.workflows`."""
        return self._loop.call(self._client.workflows())


class BlockingRun:
    """`Run`, blocking."""

    def __init__(self, loop: _Thread, run: Run) -> None:
        self._loop = loop
        self._run = run
        self.id = run.id
        self.workflow = run.workflow

    def __repr__(self) -> str:
        return repr(self._run)

    @property
    def rejected(self) -> Rejections:
        """As `Run.rejected`."""
        return self._run.rejected

    def status(self) -> Status:
        """As `Run.status`."""
        return self._loop.call(self._run.status())

    def outcomes(self) -> Generator[OutcomeRecord, None, None]:
        """As `Run.outcomes`."""
        stream = self._run.outcomes()

        async def following() -> OutcomeRecord | None:
            return await anext(stream, None)

        try:
            while (outcome := self._loop.call(following())) is not None:
                yield outcome
        finally:
            with contextlib.suppress(BusUnavailable):  # the client was closed first, and has closed the stream
                self._loop.call(stream.aclose())

    def wait(self) -> Status:
        """As `Run.wait`."""
        return self._loop.call(self._run.wait())

    def pause(self) -> None:
        """As `Run.pause`."""
        self._loop.call(self._run.pause())

    def resume(self) -> None:
        """As `Run.resume`."""
        self._loop.call(self._run.resume())

    def change(
        self,
        *,
        max_in_flight: int | None = None,
        slots: Mapping[str, int] | None = None,
        weight: float | None = None,
    ) -> None:
        """As `Run.change`."""
        self._loop.call(self._run.change(max_in_flight=max_in_flight, slots=slots, weight=weight))

    def retry_failed(self, *, reason: str = "") -> int:
        """As `Run.retry_failed`."""
        return self._loop.call(self._run.retry_failed(reason=reason))

    def cancel(self) -> int:
        """As `Run.cancel`."""
        return self._loop.call(self._run.cancel())
