"""Calls over aiohttp and msgspec alone, at a fraction of the SDK's CPU: for vLLM, SGLang and llama.cpp."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import AsyncIterator

import aiohttp
import msgspec

from .edge import CONNECT_TIMEOUT_S, MODELS_TIMEOUT_S, Edge
from .messages import SESSION_HEADER, ChatRequest, OnText, Reply
from .streaming import MOST_BYTES, events_of, read_stream

_ENCODER = msgspec.json.Encoder()
# uvicorn, which serves vLLM and SGLang, closes a connection after 5 idle seconds. Letting go of it first
# spares us the race in which a call is sent into a connection that is just being closed.
_KEEPALIVE_S = 4.0
_LARGE_BYTES = 1 << 20


class Session:
    """One aiohttp session for all endpoints of a pool, opened by the first call, closed by the last user."""

    def __init__(self) -> None:
        self._client: aiohttp.ClientSession | None = None
        self._users = 0

    def enter(self) -> None:
        """Count one more user."""
        self._users += 1

    @property
    def client(self) -> aiohttp.ClientSession:
        """The open session; needs a running event loop."""
        if self._client is None:
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._client

    async def leave(self) -> None:
        """Count one user less and close behind the last."""
        self._users -= 1
        if self._users == 0 and self._client is not None:
            client, self._client = self._client, None
            await client.close()


class DirectTransport:
    """One endpoint, called over a session that it may share with others."""

    def __init__(self, url: str, api_key: str | None = None, session: Session | None = None) -> None:
        self._edge = Edge(url, api_key)
        self._chat_url = f"{url}/chat/completions"
        self._models_url = f"{url}/models"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session = session or Session()
        self._session.enter()
        self._closed = False

    async def complete(self, request: ChatRequest, timeout_s: float, on_text: OnText | None = None) -> Reply:
        """Send one call; raises the `ModelError` that fits what went wrong."""
        model = request.model
        body = _ENCODER.encode(request.body(stream=on_text is not None))
        started = time.perf_counter()
        async with self._exchange("POST", model, body, timeout_s, request.session) as response:
            if response.status >= 400:
                retry_after = response.headers.get("Retry-After")
                raise await self._edge.refusal(
                    model, response.status, retry_after, await self._read(response, model), self.models
                )
            if on_text is not None and response.content_type == "text/event-stream":
                events = events_of(response.content.iter_any())
                return await read_stream(self._edge, model, events, on_text, started)
            answer = await self._read(response, model)
        reply = self._edge.reply(model, answer, time.perf_counter() - started)
        if on_text is not None:  # a server that does not stream: all of it is one piece
            on_text(reply.text)
        return reply

    async def models(self) -> list[str]:
        """The names of the models that the server has; raises as `complete` does."""
        async with self._exchange("GET", "", b"", MODELS_TIMEOUT_S) as response:
            answer = await self._read(response, "")
            if response.status >= 400:
                raise await self._edge.refusal("", response.status, response.headers.get("Retry-After"), answer)
        return self._edge.model_names(answer)

    async def close(self) -> None:
        """Leave the session; safe to repeat."""
        if not self._closed:
            self._closed = True
            await self._session.leave()

    async def _read(self, response: aiohttp.ClientResponse, model: str) -> bytes:
        """The whole body, unless it never ends."""
        if response.content_length is not None and response.content_length <= MOST_BYTES:
            return await response.read()
        body = bytearray()
        async for block in response.content.iter_any():
            body += block
            if len(body) > MOST_BYTES:
                raise self._edge.invalid(model, f"it is longer than {MOST_BYTES >> 20} MiB", bytes(body[:2000]))
        return bytes(body)

    @contextlib.asynccontextmanager
    async def _exchange(
        self, method: str, model: str, body: bytes, timeout_s: float, session: str = ""
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._closed:
            raise self._edge.gone(model, "this worker has closed it")
        headers = {**self._headers, SESSION_HEADER: session} if session else self._headers
        try:
            try:
                response = await self._request(method, body, timeout_s, headers)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if self._closed:
                    raise
                # Sent into a connection that the server was just closing: nothing is wrong with the server. It may
                # have read the call all the same, and a model call can be made twice.
                response = await self._request(method, body, timeout_s, headers)
            async with response:
                yield response
        except aiohttp.ConnectionTimeoutError as error:
            raise self._edge.gone(model, error) from error
        except TimeoutError as error:
            raise self._edge.timed_out(model, timeout_s) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._edge.gone(model, error) from error

    async def _request(
        self, method: str, body: bytes, timeout_s: float, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        return await self._session.client.request(
            method,
            self._chat_url if method == "POST" else self._models_url,
            # aiohttp writes plain bytes in one go and warns when they are many.
            data=(body if len(body) <= _LARGE_BYTES else io.BytesIO(body)) or None,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
        )
