"""Commands about model servers: serve, which runs or announces them, and endpoints, which lists them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from .. import endpoints
from ..bus import Bus
from ..config import ModelConfig, check_url
from ..endpoints import Beacon, Replica
from ..errors import ModelAccessDenied, ModelError, ModelNotFound, UsageError
from ..llm import ModelPool
from ..telemetry import configure_logs
from . import app
from .common import LogLevel, Server, broker_url, go, say
from .processes import Action, local_service

_CHECK_EVERY_S = 2.0
_SAMPLE_S = 1.0


@app.command()
def serve(
    what: Annotated[
        str, typer.Argument(metavar="[MODEL|start|stop|status]", help="A model, or what to do with the embedded one.")
    ] = "start",
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- WORDS...]", help="Passed on to the server as they are.")
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", help="vllm (default), sglang, llama (CPU), or command: what stands after --.")
    ] = "",
    simulate: Annotated[
        str, typer.Option("--simulate", help="No model, but its timing: a profile, embedded, instant or a .yaml file.")
    ] = "",
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Servers of the model.")] = 1,
    gpus: Annotated[str, typer.Option("--gpus", help="Such as 0,1,2,3. Default: all there are.")] = "",
    gpus_per_replica: Annotated[int, typer.Option("--gpus-per-replica", min=1, help="Tensor parallel.")] = 1,
    python: Annotated[
        str, typer.Option("--python", help="Interpreter of the environment that has vLLM or SGLang, if not this one.")
    ] = "",
    url: Annotated[
        list[str] | None, typer.Option("--url", help="Announce a server that runs elsewhere; repeatable.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="The name that it is called by, if not by MODEL.")] = "",
    host: Annotated[
        str, typer.Option("--host", help="Where servers listen; 0.0.0.0 for other machines.")
    ] = "127.0.0.1",
    advertise: Annotated[str, typer.Option("--advertise", help="Host name that workers reach them by.")] = "",
    capacity: Annotated[
        float, typer.Option("--capacity", min=0.01, help="Share of the calls, beside other servers of the model.")
    ] = 1.0,
    label: Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE, to tell servers apart.")] = None,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="With --url: environment variable with the key, here and at workers.")
    ] = "",
    azure: Annotated[
        str, typer.Option("--azure", help="With --url: a resource of Azure OpenAI, and this version of its interface.")
    ] = "",
    drain_s: Annotated[float, typer.Option("--drain-s", min=0, help="At the end, for calls under way.")] = 60.0,
    log_dir: Annotated[Path, typer.Option("--log-dir", help="Each server's log is a file there.")] = Path("serve-logs"),
    port: Annotated[int, typer.Option("--port", help="Of the embedded model; 0: a free one.")] = 0,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Of the embedded model: calls at a time.")] = 8,
    server: Server = "",
    log_level: LogLevel = "warning",
) -> None:
    """Launch servers of a model and announce them to all workers, or announce servers that run elsewhere.

    `matrix-bus serve meta-llama/Llama-3.1-8B-Instruct --replicas 4 -- --max-model-len 8192` starts four vLLM servers
    with a GPU each, waits until they answer, brings back those that crash, and drains them on Ctrl-C. With --url it
    announces a server that runs elsewhere while it answers. Runs that ask for the model (llm.model=NAME, no llm.urls)
    find the servers within a second, and leave them within two when they die.

    With --simulate the answers are not those of a model: for capacity planning and benchmarks without GPUs.

    Without a model it serves the embedded one in the foreground; `serve status` and `serve stop` are about the shared
    embedded model that workers start when needed.
    """
    configure_logs(level=log_level)
    labels = dict(_label(word) for word in label or [])
    if url:
        if not model:
            raise UsageError("--url needs --model NAME: what the workers ask for")
        config = ModelConfig(model=model, urls=url, api_key_env=api_key_env)
        if azure:
            config = msgspec.structs.replace(config, transport="azure", api_version=azure)
        go(_announce(broker_url(server), config, capacity, labels))
    elif what in list(Action):
        if Action(what) is Action.start:
            from matrix_serving.serve import serve as serve_in_foreground

            serve_in_foreground(backend or "llama", port=port, parallel=parallel)
        else:
            from matrix_serving import local_model

            local_service("model", Action(what), local_model())
    else:
        from matrix_serving.backends import BACKENDS, Wanted, shares_of_gpus

        words = tuple(extra or ())
        if simulate:
            backend, words = "simulator", ("--profile", simulate, *words)
        make = BACKENDS.get(backend or "vllm")
        if make is None:
            raise UsageError(f"unknown backend {backend!r}: there are {', '.join(BACKENDS)}")
        shares = shares_of_gpus(gpus, replicas, gpus_per_replica)
        wanted = [Wanted(what, model, words, share, python) for share in shares]
        more = {"host": host, "advertise": advertise, "capacity": capacity, "labels": labels, "drain_s": drain_s}
        launches = [make(each) for each in wanted]
        go(_launch(broker_url(server), launches, {**more, "backend": backend or "vllm", "logs": log_dir}))


@app.command("endpoints")
def list_endpoints(server: Server = "") -> None:
    """List the model servers that are announced: model, URL, load, and what they say of themselves.

    Load and tokens are from a server's own /metrics, by vLLM's names, where it has them.
    """

    async def work() -> None:
        from ..llm.metrics import sample  # aiohttp is not for every command

        async with await Bus.connect(broker_url(server), name="matrix-bus endpoints") as bus:
            found = await endpoints.listing(bus)
        if not found:
            say("no model servers are announced: matrix-bus serve --url URL --model NAME announces one")
        samples = await asyncio.gather(*(sample(replica.url, _SAMPLE_S) for replica in found))
        for replica, said in zip(found, samples, strict=True):
            labels = " ".join(f"{name}={value}" for name, value in replica.labels.items())
            age = f"{time.time() - replica.started_at:.0f} s"
            print("\t".join([replica.model, replica.url, replica.state, f"x{replica.capacity:g}", age, said, labels]))

    go(work())


@app.command()
def plan(
    outcomes: Annotated[Path, typer.Argument(metavar="OUTCOMES", help="Output of a run on a sample of the rows.")],
    profile: Annotated[str, typer.Option("--profile", help="Of the servers: a simulator's profile, or a .yaml file.")],
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Servers.")] = 1,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the whole run.")] = 100_000,
    in_flight: Annotated[int, typer.Option("--in-flight", min=1, help="As max_in_flight.")] = 1000,
) -> None:
    """Estimate how long a run takes on servers like these, from the outcomes of a sample.

    The sample's model calls are replayed through a model of continuous batching, without a clock: prefill, decode
    steps, the KV cache and its prefixes. Time outside of the model is not in it. One JSON object on stdout.
    """
    from matrix_serving.plan import estimate, read_sample
    from matrix_serving.simulator import load_profile

    found = estimate(read_sample(outcomes), load_profile(profile), replicas=replicas, rows=rows, in_flight=in_flight)
    say(
        f"{found.rows} rows on {replicas} replicas: {found.hours:.3g} hours, {found.completion_tokens_per_s:.4g} "
        f"completion tokens/s, {found.prefix_hit_share:.0%} of the prompts from the prefix cache"
    )
    print(msgspec.json.encode(found).decode())


def _label(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise UsageError(f"--label {word!r}: must be NAME=VALUE")
    return name, value


async def _launch(broker: str, launches: Sequence[Any], more: dict[str, Any]) -> None:
    from matrix_serving.replicas import serve_replicas

    async with await Bus.connect(broker, name="matrix-bus serve") as bus:
        await serve_replicas(bus, launches, _until_signal(), say=say, **more)


def _until_signal() -> asyncio.Event:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


async def _announce(broker: str, config: ModelConfig, capacity: float, labels: dict[str, str]) -> None:
    """Announces each server while it answers, until SIGTERM or Ctrl-C."""
    stopping = _until_signal()
    async with await Bus.connect(broker, name="matrix-bus serve") as bus:
        await endpoints.prepare(bus)
        beacon = Beacon(bus)
        replicas = [_replica(url, config, capacity, labels) for url in config.urls]
        beating = asyncio.create_task(beacon.run())
        keeping = asyncio.gather(*(_keep(beacon, replica, config) for replica in replicas))
        stopped = asyncio.create_task(stopping.wait())
        both: list[asyncio.Future[Any]] = [keeping, stopped]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                keeping.result()
        finally:
            for task in (*both, beating):
                task.cancel()
            for replica in replicas:
                await beacon.hide(replica.id)
        say("withdrawn: no new calls, those under way go on")


def _replica(url: str, config: ModelConfig, capacity: float, labels: dict[str, str]) -> Replica:
    check_url(url, "--url ")
    # The same server announced twice, or again after a crash, is one.
    name = blake2b(url.encode(), digest_size=8).hexdigest()
    return Replica(
        id=name,
        model=config.model,
        url=url.rstrip("/"),
        capacity=capacity,
        transport=config.transport,
        api_version=config.api_version if config.transport == "azure" else "",
        api_key_env=config.api_key_env,
        labels=labels,
        started_at=time.time(),
    )


async def _keep(beacon: Beacon, replica: Replica, config: ModelConfig) -> None:
    """Shows the replica while it answers. Raises the `ModelError` of a wrong name or key at the first look."""
    from ..worker.models import api_key

    pool = ModelPool(config, [replica.url], api_key(config))
    shown: bool | None = None
    try:
        while True:
            try:
                await pool.check()
                answers, why = True, ""
            except ModelError as error:
                if shown is None and isinstance(error, ModelNotFound | ModelAccessDenied):
                    raise  # a mistake in the command
                answers, why = False, str(error)
            if answers != shown:
                shown = answers
                if answers:
                    beacon.show(replica)
                    print(f"serving {replica.model} at {replica.url}", flush=True)
                else:
                    await beacon.hide(replica.id)
                    say(f"{why}; looking again every {_CHECK_EVERY_S:g} s")
            await asyncio.sleep(_CHECK_EVERY_S if not answers else _CHECK_EVERY_S / 2)
    finally:
        with contextlib.suppress(ModelError):
            await pool.close()
