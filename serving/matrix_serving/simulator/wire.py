"""The bytes of OpenAI's chat API, as far as the simulator speaks it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct


class StreamOptions(Struct):
    """What a stream tells besides the text."""

    include_usage: bool = False


class ChatRequest(Struct):
    """What is read of a request; everything else is accepted and ignored."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    model: str
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """Texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Refusal(Exception):  # an answer, not a failure of ours
    """The call is answered with an error, in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, kind: str, code: str | int | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        error = {"message": message, "type": kind, "param": param, "code": status if code is None else code}
        self.body = msgspec.json.encode({"error": error})


_decoder = msgspec.json.Decoder(ChatRequest)


def decode(body: bytes) -> ChatRequest:
    """A chat request; raises `Refusal` if it is none."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the request is not a chat completion request: {error}", "BadRequestError") from None


def fits(request: ChatRequest, prompt_tokens: int, max_model_len: int) -> int:
    """The most tokens that the answer may have; raises `Refusal`, in vLLM's words, if there is no room for them."""
    asked = request.max_completion_tokens or request.max_tokens
    room = max_model_len - prompt_tokens
    if room < (asked or 1):
        most = f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        raise Refusal(
            400,
            f"{most}{prompt_tokens + (asked or 1)} tokens ({prompt_tokens} in the messages, {asked or 1} in the "
            "completion). Please reduce the length of the messages or completion.",
            "BadRequestError",
        )
    return asked or room


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The account of a call."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
