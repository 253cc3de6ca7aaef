"""The one place where a server's answers become replies and errors of ours, for all transports."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from msgspec import Struct

from ..errors import (
    ContextLengthExceeded,
    EndpointGone,
    ModelAccessDenied,
    ModelError,
    ModelNotFound,
    ModelRefused,
    ModelTimeout,
    RateLimited,
    ReplyInvalid,
)
from ..orchestrator import Usage
from .messages import Reply

CONNECT_TIMEOUT_S = 10.0
"""A host that has not taken the connection by then is gone; waiting longer would help nobody."""
MODELS_TIMEOUT_S = 10.0
"""The list of models only makes an error message better."""

# In the words of vLLM, llama.cpp (type and message), OpenAI's code, and SGLang.
_CONTEXT = re.compile(
    r"maximum context length|exceed_context_size_error|available context size|context_length_exceeded"
    r"|model's context length|maximum model length",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(r"model_not_found|\bmodel\b.{0,300}\b(does not exist|not found)\b", re.IGNORECASE | re.DOTALL)


class Edge:
    """Speaks for the server at `url` in every reply and error, and blacks out the key where it turns up."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._api_key = api_key

    def reply(self, model: str, body: bytes, latency_s: float) -> Reply:
        """The completion in `body`; raises `ReplyInvalid` if there is none."""
        try:
            completion = COMPLETION.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.invalid(model, str(error), body) from None
        return self.reply_of(model, completion, body, latency_s)

    def reply_of(
        self, model: str, completion: Completion, body: bytes, latency_s: float, first_s: float = 0.0
    ) -> Reply:
        """The reply that a completion stands for; raises `ReplyInvalid` if it has no choices."""
        if not completion.choices:
            raise self.invalid(model, "it has no choices", body)
        first = completion.choices[0]
        said = first.message
        usage = completion.usage or TokenUsage()
        details = usage.prompt_tokens_details or _Details()
        return Reply(
            text=said.content or "",
            finish_reason=first.finish_reason or "",
            model=completion.model or model,
            endpoint=self._url,
            usage=Usage(usage.prompt_tokens or 0, usage.completion_tokens or 0, details.cached_tokens or 0, calls=1),
            reasoning=said.reasoning_content or said.reasoning,
            tool_calls=said.tool_calls or [],
            logprobs=first.logprobs,
            choices=[choice.message.content or "" for choice in completion.choices],
            latency_s=latency_s,
            first_s=first_s,
        )

    def model_names(self, body: bytes) -> list[str]:
        """The names in the answer to `GET /models`; raises `ReplyInvalid` if it is something else."""
        try:
            return [entry.id for entry in _MODELS.decode(body).data]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.invalid("the list of models", str(error), body) from None

    def gone(self, model: str, why: object) -> EndpointGone:
        """The connection could not be made or did not last."""
        which = f" (model {model!r})" if model else ""
        return EndpointGone(
            f"{self._url}{which} is gone: {self._excerpt(str(why) or type(why).__name__)}; "
            "check that the server runs and can be reached from this worker"
        )

    def timed_out(self, model: str, timeout_s: float) -> ModelTimeout:
        """The call was sent and its time is up."""
        return ModelTimeout(
            f"{self._url} did not answer for model {model!r} within {timeout_s:g} s; "
            "raise the model's timeout_s, or lower max_tokens or the model's concurrency"
        )

    async def refusal(
        self,
        model: str,
        status: int,
        retry_after: str | None,
        body: bytes,
        models: Callable[[], Awaitable[list[str]]] | None = None,
    ) -> ModelError:
        """The error for an HTTP `status` of 400 or more; `models` is asked only if the model is unknown."""
        said = self._excerpt(_explanation(body)) or "(no explanation)"
        where = f"{self._url} (model {model!r}) answered {status}"
        if status in {401, 403}:
            # Providers quote parts of the key in their message, so none of it is repeated here.
            return ModelAccessDenied(
                f"{where}: the key is missing, wrong or not allowed to use the model; check the environment "
                "variable that the model's api_key_env names, in the worker's environment"
            )
        if status in {429, 503}:
            wait_s = _seconds(retry_after)
            asks = "" if wait_s is None else f" and asks to wait {wait_s:g} s"
            return RateLimited(f"{where}{asks}: {said}; lower the model's concurrency if it persists", wait_s)
        if status >= 500:
            return EndpointGone(f"{where}: {said}; see the server's log", answered=True)
        if _CONTEXT.search(body.decode(errors="replace")):
            return ContextLengthExceeded(
                f"{where}: {said}; shorten the prompt, lower max_tokens or serve the model with a longer context"
            )
        if status == 404 or (status == 400 and _NO_MODEL.search(said)):
            return ModelNotFound(f"{where}: {said}; {await _advice(models)}")
        return ModelRefused(f"{where}: {said}; the same request will be refused again, so change it")

    def invalid(self, model: str, why: str, body: bytes) -> ReplyInvalid:
        """The server said something else."""
        found = self._excerpt(body[:2000].decode(errors="replace"))
        return ReplyInvalid(
            f"the reply of {self._url} (model {model!r}) is not a chat completion: {why}; "
            f"it begins {found!r}; check that the URL is that of an OpenAI-compatible server and ends in /v1"
        )

    def _excerpt(self, text: str) -> str:
        if self._api_key:
            text = text.replace(self._api_key, "[key]")
        return text[:500]


async def _advice(models: Callable[[], Awaitable[list[str]]] | None) -> str:
    try:
        names = await models() if models else None
    except ModelError:
        names = None
    if names is None:
        return "it does not list its models either: check that the URL ends in /v1"
    return f"it has {', '.join(map(repr, names[:20])) or 'no models'}: set the model's name to one of them"


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` as seconds from now: it is either a number or an HTTP date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _explanation(body: bytes) -> str:
    """The server's own words: OpenAI's `error.message`, vLLM's `message`, FastAPI's `detail`, else all."""
    try:
        found: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode(errors="replace").strip()
    for key in ("error", "message", "detail"):
        while isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else msgspec.json.encode(found).decode()


# Only what is read, and all of it optional: servers differ in what they leave out and what they set to null.


class _Details(Struct):
    cached_tokens: int | None = None


class TokenUsage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class Said(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(Struct):
    message: Said
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class Completion(Struct):
    choices: list[Choice]
    usage: TokenUsage | None = None
    model: str | None = None


class _ModelEntry(Struct):
    id: str


class _Models(Struct):
    data: list[_ModelEntry]


COMPLETION = msgspec.json.Decoder(Completion)
_MODELS = msgspec.json.Decoder(_Models)
