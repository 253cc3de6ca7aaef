"""What a simulated server says, and at what length."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import math
import os
import random
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Struct

from matrix_bus.dataset import Rejected, read
from matrix_bus.errors import ConfigError, user_frames

T = TypeVar("T")

Lengths = Callable[[], int]
"""Draws the tokens of the next answer."""

Request = dict[str, Any]
"""The body of a chat request, as it was sent."""

Responder = Callable[[Request], str | Awaitable[str]]
"""Says the answer to a request. Raises `LookupError` if it has none."""


def lengths(spec: str, seed: int = 0) -> Lengths | None:
    """A distribution of lengths in tokens; None for an empty `spec`: as long as what the responder says.

    `fixed:N`, `uniform:LOW:HIGH`, `lognormal:MEDIAN:SIGMA` (sigma of the logarithm), or `recorded:FILE`, JSONL or
    JSONL.zst, where each line has `completion_tokens` or `usage.completion_tokens`. Raises `ConfigError` for anything
    else, `DatasetError` for a file that cannot be read.
    """
    if not spec:
        return None
    kind, _, rest = spec.partition(":")
    if kind == "recorded":
        return _recorded_lengths(rest, seed)
    draw = random.Random(seed)
    try:
        numbers = [float(part) for part in rest.split(":")]
    except ValueError:
        numbers = []
    match kind, numbers:
        case "fixed", [tokens] if 1 <= tokens < math.inf:
            return lambda: int(tokens)
        case "uniform", [low, high] if 1 <= low <= high < math.inf:
            return lambda: draw.randint(int(low), int(high))
        case "lognormal", [median, sigma] if 1 <= median < math.inf and 0 <= sigma <= 10:
            return lambda: max(1, round(draw.lognormvariate(math.log(median), sigma)))
    raise ConfigError(
        f"the length {spec!r} is none of fixed:TOKENS, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA, recorded:FILE, "
        "with at least 1 token"
    )


def responder(spec: str) -> Responder:
    """What says the answers: `echo` (the last user message), `fixed:TEXT`, `recorded:FILE` or `script:module:function`.

    A recorded line, JSONL or JSONL.zst, has an `answer`, and `messages` or `prompt_hash` if it answers that prompt
    only; the others are said in order, over and over. A script's function takes the request's body and returns
    the text, or a coroutine of it. Raises `ConfigError` or `DatasetError`.
    """
    kind, _, rest = spec.partition(":")
    match kind:
        case "echo" if not rest:
            return _echo
        case "fixed":
            return lambda _: rest
        case "recorded" if rest:
            return _recorded_answers(rest)
        case "script" if rest.count(":") == 1:
            return _script(*rest.split(":"))
    raise ConfigError(f"the responder {spec!r} is none of echo, fixed:TEXT, recorded:FILE, script:module:function")


def fit(text: str, chars: int) -> str:
    """The text at exactly this length: cut, or said again and again."""
    if len(text) < chars:
        text = (text + " ") * (chars // (len(text) + 1) + 1) if text else "." * chars
    return text[:chars]


def content_text(content: Any) -> str:
    """The text of a message's content; images and the like count as nothing."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


def prompt_hash(messages: Sequence[dict[str, Any]]) -> str:
    """Names a prompt in a file of recorded answers: SHA-256 of each message's role and text, 16 hex digits."""
    said = [[message.get("role"), content_text(message.get("content"))] for message in messages]
    return hashlib.sha256(msgspec.json.encode(said)).hexdigest()[:16]


def _echo(request: Request) -> str:
    users = [message for message in request["messages"] if message.get("role") == "user"]
    return content_text((users or request["messages"])[-1].get("content"))


class _Usage(Struct):
    completion_tokens: int | None = None


class _RecordedLength(Struct):
    completion_tokens: int | None = None
    usage: _Usage | None = None


class _RecordedAnswer(Struct):
    answer: str
    messages: list[dict[str, Any]] | None = None
    prompt_hash: str | None = None


def _recorded_lengths(path: str, seed: int) -> Lengths:
    found = []
    for line, record in _records(path, _RecordedLength):
        tokens = record.completion_tokens or (record.usage and record.usage.completion_tokens)
        if not tokens or tokens < 1:
            raise ConfigError(f"{path}: row {line} has no completion_tokens of at least 1")
        found.append(tokens)
    draw = random.Random(seed)
    return lambda: draw.choice(found)


def _recorded_answers(path: str) -> Responder:
    by_prompt: dict[str, str] = {}
    in_order: list[str] = []
    for _, record in _records(path, _RecordedAnswer):
        if record.messages is not None or record.prompt_hash is not None:
            by_prompt[record.prompt_hash or prompt_hash(record.messages or [])] = record.answer
        else:
            in_order.append(record.answer)
    following = itertools.cycle(in_order)

    def answer(request: Request) -> str:
        key = prompt_hash(request["messages"]) if by_prompt else ""
        if (text := by_prompt.get(key)) is not None:
            return text
        if not in_order:
            raise LookupError(f"{path} has no answer to the prompt with the hash {key}")
        return next(following)

    return answer


def _records(path: str, kind: type[T]) -> Iterator[tuple[int, T]]:
    decoder = msgspec.json.Decoder(kind)
    for row in read(path):
        if isinstance(row, Rejected):
            raise ConfigError(f"{path}, line {row.line}: {row.reason}")
        try:
            yield row.number + 1, decoder.decode(row.body)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, row {row.number + 1}: {error}") from None


def _script(module: str, function: str) -> Responder:
    if os.getcwd() not in sys.path:  # as `python -m` does: scripts lie in the current folder
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise ConfigError(f"cannot import the responder {module}: {error!r}\n{user_frames(error)}".rstrip()) from None
    if not inspect.isroutine(found):
        raise ConfigError(f"the module {module} has no function {function!r}")
    return cast(Responder, found)
