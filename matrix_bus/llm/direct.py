"""Calls over aiohttp and msgspec alone, at a fraction of the SDK's CPU: for vLLM, SGLang and llama.cpp."""

from __future__ import annotations

import io
import time

import aiohttp
import msgspec

from .edge import CONNECT_TIMEOUT_S, MODELS_TIMEOUT_S, Edge
from .messages import ChatRequest, Reply

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

    async def complete(self, request: ChatRequest, timeout_s: float) -> Reply:
        """Send one call; raises the `ModelError` that fits what went wrong."""
        body = _ENCODER.encode(request.body())
        started = time.perf_counter()
        status, retry_after, answer = await self._exchange("POST", request.model, body, timeout_s)
        if status >= 400:
            raise await self._edge.refusal(request.model, status, retry_after, answer, self.models)
        return self._edge.reply(request.model, answer, time.perf_counter() - started)

    async def models(self) -> list[str]:
        """The names of the models that the server has; raises as `complete` does."""
        status, retry_after, answer = await self._exchange("GET", "", b"", MODELS_TIMEOUT_S)
        if status >= 400:
            raise await self._edge.refusal("", status, retry_after, answer)
        return self._edge.model_names(answer)

    async def close(self) -> None:
        """Leave the session; safe to repeat."""
        if not self._closed:
            self._closed = True
            await self._session.leave()

    async def _exchange(self, method: str, model: str, body: bytes, timeout_s: float) -> tuple[int, str | None, bytes]:
        if self._closed:
            raise self._edge.gone(model, "this worker has closed it")
        try:
            async with self._session.client.request(
                method,
                self._chat_url if method == "POST" else self._models_url,
                # aiohttp writes plain bytes in one go and warns when they are many.
                data=(body if len(body) <= _LARGE_BYTES else io.BytesIO(body)) or None,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            ) as response:
                return response.status, response.headers.get("Retry-After"), await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise self._edge.gone(model, error) from error
        except TimeoutError as error:
            raise self._edge.timed_out(model, timeout_s) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._edge.gone(model, error) from error
