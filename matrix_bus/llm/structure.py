"""Structured output: a msgspec type as the JSON schema that a server is asked for, and a reply read as that type."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from ..errors import HandlerError

T = TypeVar("T")

_FENCE = re.compile(r"```[a-zA-Z0-9]*\s*\n(.*?)```", re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


def schema_of(kind: type[Any]) -> dict[str, Any]:
    """The JSON schema of a type. Raises `HandlerError` for one that JSON has no schema for."""
    try:
        schema = msgspec.json.schema(kind)
    except (TypeError, ValueError) as error:
        raise HandlerError(f"parse({getattr(kind, '__name__', kind)!s}): no JSON schema for it: {error}") from None
    return schema


def response_format(kind: type[Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The body parameter that asks OpenAI, vLLM, SGLang and llama.cpp for guided decoding."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", getattr(kind, "__name__", "reply"))[:64]
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def instruction(schema: dict[str, Any]) -> str:
    """What asks for the same in words, where the server cannot guide."""
    return f"Answer with one JSON value and nothing else. It must match this JSON schema:\n{json.dumps(schema)}"


def read(text: str, kind: type[T]) -> T:
    """The first JSON value in a text that fits: all of it, in a fence, or bare among words.

    Raises `ValueError` that says what is wrong with the first JSON value that was found, or that there is none.
    """
    why = ""
    for candidate in _candidates(_THOUGHT.sub("", text)):
        try:
            return msgspec.json.decode(candidate, type=kind)
        except (msgspec.DecodeError, UnicodeError) as error:
            why = why or str(error)
    raise ValueError(why or "there is no JSON in it")


def _candidates(text: str) -> Iterator[str]:
    stripped = text.strip()
    if stripped[:1] in ("{", "["):
        yield stripped
    yield from (found.strip() for found in _FENCE.findall(text))
    decoder = json.JSONDecoder()
    at = 0
    while (start := min((i for i in (text.find("{", at), text.find("[", at)) if i >= 0), default=-1)) >= 0:
        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
        else:
            yield text[start:end]
            at = end
