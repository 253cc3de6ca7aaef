"""A model whose answers are given beforehand: for trying a workflow without one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

from ..errors import HandlerError
from ..orchestrator import Usage
from .messages import ChatRequest, OnText, Reply
from .pool import Flight

Answer = str | Reply | Exception
Responder = Sequence[Answer] | Callable[[ChatRequest], Answer | Awaitable[Answer]]
"""The answers in the order of the calls, or a function of the call."""

ENDPOINT = "scripted"
"""What stands in the history in place of a URL."""


class ScriptedModels:
    """Models of any alias, which all answer from one script."""

    def __init__(self, responder: Responder | None) -> None:
        """Raises `HandlerError` for what is neither a list of answers nor a function."""
        if isinstance(responder, str | Reply | Exception) or not (
            responder is None or callable(responder) or isinstance(responder, Sequence)
        ):
            raise HandlerError(f"llm must be a list of answers or a function of the request, not {responder!r:.100}")
        self._respond = responder if callable(responder) else None
        self._answers: Iterator[Answer] = iter(()) if responder is None or callable(responder) else iter(responder)
        self._calls = 0

    def named(self, alias: str | None) -> ScriptedModel:
        """The model of an alias; it goes by the alias's name."""
        return ScriptedModel(alias or "default", self._answer)

    async def _answer(self, request: ChatRequest) -> Answer:
        self._calls += 1
        if self._respond is not None:
            answer = self._respond(request)
            return await answer if isinstance(answer, Awaitable) else answer
        for found in self._answers:
            return found
        raise HandlerError(
            f"model call {self._calls} has no answer left: pass llm=[…] with as many answers as the row makes calls, "
            "or llm=function"
        )


class ScriptedModel:
    """One model, as an `LLM` calls it."""

    def __init__(self, model: str, answer: Callable[[ChatRequest], Awaitable[Answer]]) -> None:
        self.model = model
        self.guided = True
        self._answer = answer

    async def complete(
        self, request: ChatRequest, flight: Flight, on_text: OnText | None = None
    ) -> tuple[Reply, float]:
        """The scripted reply, after no time in line. Raises the scripted exception."""
        flight.endpoint = ENDPOINT
        answer = await self._answer(request)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            answer = Reply(text=answer, finish_reason="stop", model=self.model, endpoint=ENDPOINT, usage=Usage(calls=1))
        if not isinstance(answer, Reply):
            raise HandlerError(f"llm answered {answer!r:.100}: an answer is a text, a Reply or an exception")
        return answer, 0.0
