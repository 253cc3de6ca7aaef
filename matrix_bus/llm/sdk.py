"""Calls through the openai package, which knows hosted providers and is imported only when used."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ..errors import ConfigError
from .edge import CONNECT_TIMEOUT_S, MODELS_TIMEOUT_S, Edge
from .messages import SESSION_HEADER, ChatRequest, OnText, Reply
from .streaming import read_stream

if TYPE_CHECKING:
    from openai import AsyncOpenAI, AsyncStream, RequestOptions

T = TypeVar("T")


class SdkTransport:
    """One endpoint, called by an `AsyncOpenAI` of its own, without its retries: the pool's are enough."""

    def __init__(self, url: str, api_key: str | None = None, azure_version: str = "") -> None:
        """`azure_version` is the version of Azure's interface, where the URL is a resource of theirs.

        Raises `ConfigError` for a URL that the SDK does not take.
        """
        self._edge = Edge(url, api_key)
        try:
            self._client = _client(url, api_key, azure_version)
        except Exception as error:  # InvalidURL of httpx or of httpx2, which is no `ValueError`
            raise ConfigError(f"the openai package does not take {url!r} for the URL of a server: {error}") from error
        self._options = _options(api_key)
        self._closed = False

    async def complete(self, request: ChatRequest, timeout_s: float, on_text: OnText | None = None) -> Reply:
        """Send one call; raises the `ModelError` that fits what went wrong."""
        body = msgspec.to_builtins(request.body(stream=on_text is not None))
        options = self._options
        if request.session:
            options = {**options, "headers": {**(options.get("headers") or {}), SESSION_HEADER: request.session}}
        started = time.perf_counter()
        if on_text is not None:
            return await self._exchange(
                lambda: self._stream(request.model, body, options, on_text, started), request.model, timeout_s
            )
        # Plain bytes: the reply is read by the decoder that the direct transport uses, not by pydantic.
        answer = await self._exchange(
            lambda: self._client.post("/chat/completions", cast_to=bytes, body=body, options=options),
            request.model,
            timeout_s,
        )
        return self._edge.reply(request.model, answer, time.perf_counter() - started)

    async def models(self) -> list[str]:
        """The names of the models that the server has; raises as `complete` does."""
        answer = await self._exchange(
            lambda: self._client.get("/models", cast_to=bytes, options=self._options), "", MODELS_TIMEOUT_S
        )
        return self._edge.model_names(answer)

    async def close(self) -> None:
        """Close the connections; safe to repeat."""
        self._closed = True
        await self._client.close()

    async def _stream(self, model: str, body: Any, options: RequestOptions, on_text: OnText, started: float) -> Reply:
        stream = await self._client.post(
            "/chat/completions", cast_to=bytes, body=body, options=options, stream=True, stream_cls=_events()
        )
        async with stream:
            return await read_stream(self._edge, model, aiter(stream), on_text, started)

    async def _exchange(self, call: Callable[[], Awaitable[T]], model: str, timeout_s: float) -> T:
        import openai

        try:
            # The SDK's own timeouts are per read, so that a server which trickles would never run into one.
            async with asyncio.timeout(timeout_s):
                try:
                    return await call()
                except openai.APIConnectionError:
                    if self._closed:
                        raise
                    # It may have been sent into a connection that the server was just closing.
                    return await call()
        except TimeoutError as error:
            raise self._edge.timed_out(model, timeout_s) from error
        except openai.APIStatusError as error:
            answer = error.response
            raise await self._edge.refusal(
                model,
                error.status_code,
                answer.headers.get("Retry-After"),
                answer.content,
                self.models if model else None,
            ) from error
        except openai.APIConnectionError as error:
            # A timeout inside the SDK is included: the only one set is that for connecting.
            raise self._edge.gone(model, error.__cause__ or error) from error
        except (openai.OpenAIError, RuntimeError) as error:
            if not (self._closed or isinstance(error, openai.OpenAIError)):
                raise
            raise self._edge.gone(model, error) from error


@functools.cache
def _events() -> type[AsyncStream[bytes]]:
    """The SDK's stream, without its pydantic models: the data of each event as it came."""
    import openai

    class Events(openai.AsyncStream[bytes]):
        async def __stream__(self) -> AsyncIterator[bytes]:
            async for event in self._iter_events():
                yield event.data.encode()

    return Events


def _options(api_key: str | None) -> RequestOptions:
    import openai

    return {} if api_key else {"headers": {"Authorization": openai.Omit()}}


def _client(url: str, api_key: str | None, azure_version: str) -> AsyncOpenAI:
    import openai

    # The SDK sits on httpx in one major version and on httpx2 in the next; its own names serve for both.
    timeout = openai.Timeout(None, connect=CONNECT_TIMEOUT_S)
    unlimited = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=None, max_keepalive_connections=None)
    try:
        http_client = openai.DefaultAioHttpClient(timeout=timeout, limits=unlimited)
    except RuntimeError:  # an SDK without its aiohttp extra: the same at thrice the CPU
        http_client = openai.DefaultAsyncHttpxClient(timeout=timeout, limits=unlimited)
    if azure_version:
        return openai.AsyncAzureOpenAI(
            azure_endpoint=url,
            api_version=azure_version,
            api_key=api_key or "none",
            max_retries=0,
            timeout=timeout,
            http_client=http_client,
        )
    return openai.AsyncOpenAI(
        base_url=url,
        # None would mean OPENAI_API_KEY from the environment, which is not for this server to see.
        api_key=api_key or "none",
        max_retries=0,
        timeout=timeout,
        http_client=http_client,
    )
