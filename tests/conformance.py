"""What every transport must make of every server, whatever model it has: called by the tests of each of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from matrix_bus.config import Sampling
from matrix_bus.errors import ContextLengthExceeded, ModelNotFound
from matrix_bus.llm import LLM, ChatRequest, ModelPool, assistant, system, user

CHAT = [user("What is the capital of France?")]


def llm_over(pool: ModelPool) -> LLM:
    """As a handler has it; greedy, and brief."""
    return LLM(lambda _: pool, "default", Sampling(temperature=0.0, max_tokens=40), [], "tester", 1, 1, 7)


async def answers_with_usage(pool: ModelPool) -> None:
    await pool.check()
    reply = await llm_over(pool).chat(CHAT)
    assert reply.text
    assert reply.finish_reason in ("stop", "length")
    assert reply.usage.prompt_tokens > 5
    assert 0 < reply.usage.completion_tokens <= 40
    assert reply.latency_s > 0


async def takes_a_conversation(pool: ModelPool) -> None:
    chat = [system("You are a geographer."), *CHAT, assistant("Paris."), user("And of Italy?")]
    longer = await llm_over(pool).chat(chat)
    assert longer.text
    assert longer.usage.prompt_tokens > (await llm_over(pool).chat(CHAT)).usage.prompt_tokens


async def streams_the_same(pool: ModelPool) -> None:
    heard: list[str] = []
    reply = await llm_over(pool).chat(CHAT, on_text=heard.append)
    assert "".join(heard) == reply.text == (await llm_over(pool).chat(CHAT)).text
    assert 0 < reply.usage.completion_tokens <= 40
    assert 0 < reply.first_s <= reply.latency_s


async def stops(pool: ModelPool) -> None:
    said = (await llm_over(pool).chat(CHAT)).text
    word = said.split()[-1]
    stopped = await llm_over(pool).chat(CHAT, stop=[word])
    assert word not in stopped.text
    short = await llm_over(pool).chat(CHAT, max_tokens=2)
    assert (short.usage.completion_tokens, short.finish_reason) == (2, "length")


async def refuses_what_is_too_long(pool: ModelPool) -> None:
    with pytest.raises(ContextLengthExceeded):
        await llm_over(pool).chat([user("word " * 20_000)])


async def knows_its_models(pool: ModelPool) -> None:
    with pytest.raises(ModelNotFound, match=pool.model):
        await pool.complete(ChatRequest("no-such-model", CHAT))


class City(msgspec.Struct):
    name: str
    is_capital: bool


async def decodes_by_a_schema(pool: ModelPool) -> None:
    city = await llm_over(pool).parse([user("Describe Paris as JSON with name and is_capital.")], City, max_tokens=60)
    assert isinstance(city, City)
    assert pool.guided


async def has_choices_and_logprobs(pool: ModelPool) -> None:
    reply = await llm_over(pool).chat(CHAT, n=3, logprobs=2, temperature=1.0)
    assert len(reply.choices) == 3
    assert reply.logprobs is not None
    assert len(reply.logprobs["content"][0]["top_logprobs"]) == 2


Check = Callable[[ModelPool], Awaitable[None]]
ALL: tuple[Check, ...] = (answers_with_usage, takes_a_conversation, streams_the_same, stops, refuses_what_is_too_long)
"""What every server can."""
