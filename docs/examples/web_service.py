"""A web service around matrix-bus: submit rows over HTTP, ask where a run stands, stream its outcomes.

    MATRIX_BUS_SERVER=nats://127.0.0.1:4222 python web_service.py 8080

    curl --data-binary @topics.jsonl 'http://127.0.0.1:8080/runs/draft?run=nightly'
    curl http://127.0.0.1:8080/runs/nightly
    curl -N http://127.0.0.1:8080/runs/nightly/outcomes

It listens on loopback and knows no users: put your own authentication before it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
from aiohttp import web

import matrix_bus as mb

BUS: web.AppKey[mb.Client] = web.AppKey("bus", mb.Client)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def reply(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What matrix-bus says about a request goes to whoever made it."""
    try:
        return await handler(request)
    except mb.UsageError as error:
        return reply({"error": str(error)}, status=400)
    except mb.BusError as error:
        return reply({"error": str(error)}, status=503)


async def submit(request: web.Request) -> web.Response:
    """Rows are read from the upload as the broker takes them: a fast client is slowed down, not buffered.

    A client that leaves in the middle leaves the run unsealed; the same upload again, with its id, completes it.
    """

    async def lines() -> AsyncIterator[bytes]:
        async for line in request.content:
            yield line

    run = await request.app[BUS].submit(
        request.match_info["workflow"],
        lines(),
        run=request.query.get("run", ""),
        config=msgspec.json.decode(request.query.get("config", "{}")),
    )
    return reply({"run": run.id, "rejected": run.rejected.count, "first": run.rejected.first}, status=201)


async def status(request: web.Request) -> web.Response:
    run = await request.app[BUS].run(request.match_info["run"])
    return reply(await run.status())


async def outcomes(request: web.Request) -> web.StreamResponse:
    """One JSON object a line, from the first to the last of the run, as they come."""
    run = await request.app[BUS].run(request.match_info["run"])
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionResetError):  # the reader has left
        async for outcome in run.outcomes():
            await response.write(msgspec.json.encode(outcome) + b"\n")
        await response.write_eof()
    return response


async def runs(request: web.Request) -> web.Response:
    return reply([{"run": run.id, "workflow": run.workflow} for run in await request.app[BUS].runs()])


async def connected(app: web.Application) -> AsyncIterator[None]:
    """One connection for the life of the service."""
    async with mb.connect(name="web service") as app[BUS]:
        yield


def make_app() -> web.Application:
    app = web.Application(middlewares=[errors])
    app.cleanup_ctx.append(connected)
    app.add_routes(
        [
            web.get("/runs", runs),
            web.post("/runs/{workflow}", submit),
            web.get("/runs/{run}", status),
            web.get("/runs/{run}/outcomes", outcomes),
        ]
    )
    return app


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
    # A client that leaves ends its handler, and with it what the handler follows on the bus.
    web.run_app(make_app(), host="127.0.0.1", port=port, handler_cancellation=True)
