"""The processes of a run under attack, and the loop that attacks them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matrix_bus.broker import Broker, private_cluster
from tests.chaos.plan import ACK_WAIT_S, Strike
from tests.chaos.proxy import Proxy
from tests.chaos.verdict import Blow, Verdict, judge, read_calls

RUN = "chaos-run"
FLOW = Path(__file__).with_name("flow.py")
_POLL_S = 0.02


@dataclass(frozen=True)
class Shape:
    """How large a run is, and what it runs on."""

    rows: int
    workers: int = 3
    in_flight: int = 300
    seconds: float = 0.01
    """How long a handler takes."""
    cluster: bool = False
    sabotage: str = ""
    """A promise that the workers are made to break, to see that the verdict notices."""
    stalled_after_s: float = 90.0
    """Without a call or an outcome for so long, what is missing counts as lost."""


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    words: list[str]
    proxies: list[Proxy] = field(default_factory=list)
    frozen: bool = False

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


@dataclass
class Harness:
    """One run in `folder`: `attack` carries out a plan and returns the verdict."""

    folder: Path
    shape: Shape
    blows: list[Blow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._calls = self.folder / "calls"
        self._calls.mkdir()
        self._output = self.folder / "out.jsonl"
        self._data = self.folder / "data.jsonl"
        with self._data.open("w") as file:
            file.writelines(f'{{"x": {x}, "id": {x}}}\n' for x in range(self.shape.rows))
        nodes = private_cluster(self.folder) if self.shape.cluster else [Broker(self.folder / "broker")]
        self._nodes: list[Broker] = nodes
        self._workers: list[_Child] = []
        self._submitter: _Child | None = None
        self._collector: _Child | None = None
        self._submitted = False
        self._timers: list[threading.Timer] = []
        self._sizes: dict[str, tuple[int, int]] = {}

    # --- processes --------------------------------------------------------------------------------------------

    @property
    def _server(self) -> str:
        return ",".join(node.url for node in self._nodes)

    def _start(self, words: Sequence[str], server: str, proxies: Sequence[Proxy] = ()) -> _Child:
        module = "tests.chaos.sabotaged" if self.shape.sabotage else "matrix_bus"
        command = [sys.executable, "-m", module, *words, "--server", server]
        environment = {
            **os.environ,
            "CHAOS_CALLS": str(self._calls),
            "CHAOS_SECONDS": str(self.shape.seconds),
            "CHAOS_SABOTAGE": self.shape.sabotage,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path) + os.pathsep + os.getcwd(),
        }
        with (self.folder / f"{words[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return _Child(process, list(words), list(proxies))

    def _start_worker(self) -> None:
        words = ["worker", "--workflow", str(FLOW), "--slots", "400", "--log-level", "info"]
        proxies = [Proxy(node.port) for node in self._nodes]
        server = ",".join(f"nats://127.0.0.1:{proxy.port}" for proxy in proxies)
        self._workers.append(self._start(words, server, proxies))

    def _start_submitter(self) -> None:
        words = ["submit", str(self._data), "--workflow", str(FLOW), "--run", RUN, "--detach"]
        words += [f"max_in_flight={self.shape.in_flight}", f"ack_wait_s={ACK_WAIT_S}"]
        words += ["broker.replicas=3"] if self.shape.cluster else []
        self._submitter = self._start(words, self._server)

    def _start_collector(self) -> None:
        self._collector = self._start(["collect", RUN, "--output", str(self._output), "--follow"], self._server)

    def _tend(self) -> None:
        """Starts what has ended and must go on."""
        for worker in [worker for worker in self._workers if not worker.alive]:
            self._workers.remove(worker)
            for proxy in worker.proxies:
                proxy.close()
        while len(self._workers) < self.shape.workers:
            self._start_worker()
        if not self._submitted:
            if self._submitter is None:
                self._start_submitter()
            elif not self._submitter.alive:
                self._submitted = self._submitter.process.returncode == 0
                if not self._submitted:
                    self._start_submitter()
        if self._collector is None:
            if self._made() > 0:  # before that there may be no run yet
                self._start_collector()
        elif not self._collector.alive and self._collector.process.returncode != 0:
            self._start_collector()

    # --- the attack -------------------------------------------------------------------------------------------

    def attack(self, plan: Sequence[Strike]) -> Verdict:
        """Runs to the end, through all strikes, and judges."""
        started = time.monotonic()
        waiting = list(plan)
        moved_at, before = started, (0, 0)
        try:
            for node in self._nodes:
                node.start()
            while not self._complete():
                self._tend()
                made = self._made()
                now = (made, self._output.stat().st_size if self._output.exists() else 0)
                if now != before:
                    moved_at, before = time.monotonic(), now
                if time.monotonic() - moved_at > self.shape.stalled_after_s:
                    break
                if waiting and made >= waiting[0].at * self.shape.rows * 8 and self._strike(waiting[0]):
                    waiting.pop(0)
                time.sleep(_POLL_S)
            seconds = time.monotonic() - started
        finally:
            self._end()
        return judge(self.shape.rows, self._output, read_calls(self._calls), self.blows, seconds)

    def _made(self) -> int:
        """Handler calls so far, from the sizes of the files: a line is read once."""
        total = 0
        for file in self._calls.iterdir():
            size, count = self._sizes.get(file.name, (0, 0))
            if file.stat().st_size > size:
                with file.open("rb") as stream:
                    stream.seek(size)
                    fresh = stream.read()
                count += fresh.count(b"> ")
                self._sizes[file.name] = (size + len(fresh), count)
            total += count
        return total

    def _complete(self) -> bool:
        collector = self._collector
        return collector is not None and not collector.alive and collector.process.returncode == 0

    def _strike(self, strike: Strike) -> bool:
        """False if its victim is not there at the moment: then it is carried out a little later."""
        victims: list[int] = []
        action = strike.action
        if action == "kill submitter" and self._submitted:
            action = "kill worker"  # it has ended for good
        match action:
            case "kill worker" | "terminate worker" | "freeze worker":
                candidates = [worker for worker in self._workers if worker.alive and not worker.frozen]
                if not candidates:
                    return False
                worker = candidates[int(strike.choice * len(candidates))]
                victims = self._hit(worker, action, strike.pause_s)
            case "cut connections":
                for worker in self._workers:
                    for proxy in worker.proxies:
                        proxy.cut(strike.pause_s)
            case "kill broker" | "kill leader":
                if not all(self._is_up(node) for node in self._nodes):
                    return False  # one at a time: more is the loss of a majority
                node = self._nodes[int(strike.choice * len(self._nodes))]
                if action == "kill leader":
                    node = self._leader() or node
                node.kill()
                self._later(strike.pause_s, node.start)
            case "kill submitter" | "kill collector":
                child = self._submitter if action == "kill submitter" else self._collector
                if child is None or not child.alive:
                    return False
                child.process.kill()
                child.process.wait()
        self.blows.append(Blow(action, time.time(), tuple(victims)))
        return True

    def _hit(self, worker: _Child, action: str, pause_s: float) -> list[int]:
        """The workers whose calls may be repeated: one that is asked to end finishes them."""
        if action == "terminate worker":
            worker.process.send_signal(signal.SIGTERM)
            return []
        if action == "kill worker":
            worker.process.kill()
            worker.process.wait()
        else:
            worker.process.send_signal(signal.SIGSTOP)
            worker.frozen = True
            self._later(pause_s, lambda: self._thaw(worker))
        return [worker.process.pid]

    def _thaw(self, worker: _Child) -> None:
        worker.frozen = False
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(signal.SIGCONT)

    def _later(self, pause_s: float, work: Any) -> None:
        timer = threading.Timer(pause_s, work)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    @staticmethod
    def _is_up(node: Broker) -> bool:
        try:
            return node.pid > 0
        except Exception:
            return False

    def _leader(self) -> Broker | None:
        """The node that leads the run's queue, asked through the command line's own connection."""
        import asyncio

        from matrix_bus.bus import Bus
        from matrix_bus.orchestrator import work_stream

        async def ask() -> str:
            async with await Bus.connect(self._server, timeout_s=2) as bus:
                info = await bus.api(f"STREAM.INFO.{work_stream(RUN)}", timeout_s=2)
                return str(info["cluster"]["leader"])

        try:
            name = asyncio.run(ask())
        except Exception:  # no leader at this moment
            return None
        return next((node for node in self._nodes if node.name == name), None)

    def _end(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for child in [*self._workers, self._submitter, self._collector]:
            if child is not None and child.alive:
                child.process.kill()
                child.process.wait()
        for worker in self._workers:
            for proxy in worker.proxies:
                proxy.close()
        for node in self._nodes:
            node.kill()
        record = {"shape": str(self.shape), "blows": [str(blow) for blow in self.blows]}
        (self.folder / "attack.json").write_text(json.dumps(record, indent=1))
