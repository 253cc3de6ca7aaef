"""The roles of coral and their routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matrix_bus as mb

from .answers import agreed_answer, parse_answer
from .prompts import conversation, extraction
from .state import CoralConfig, Discussion, Turn

# As in the configuration that was released with the paper (facebookresearch/matrix, coral_resources.yaml).
_AGENT = mb.Sampling(temperature=0.2, top_p=0.9, max_tokens=1024)
_EXTRACTOR = mb.Sampling(temperature=0.0, max_tokens=32)

flow = mb.Workflow(
    "coral",
    state=Discussion,
    start="solver",
    config=CoralConfig,
    quick={
        "workflow.max_turns": 4,
        "roles.solver.max_tokens": 96,
        "roles.reviewer.max_tokens": 96,
    },
)


@flow.role(sampling=_AGENT)
async def solver(row: mb.Row[Discussion], llm: mb.LLM) -> mb.Next:
    """Proposes an answer and defends or changes it."""
    await _speak("solver", row, llm)
    return mb.to("extractor")


@flow.role(sampling=_AGENT)
async def reviewer(row: mb.Row[Discussion], llm: mb.LLM) -> mb.Next:
    """Checks the solver's reasoning and gives an answer of its own."""
    await _speak("reviewer", row, llm)
    return mb.to("extractor")


async def _speak(agent: str, row: mb.Row[Discussion], llm: mb.LLM) -> None:
    reply = await llm.chat(conversation(agent, row.state))
    row.state.coral_turns.append(Turn(agent, reply.text))


@flow.role(sampling=_EXTRACTOR)
async def extractor(row: mb.Row[Discussion], llm: mb.LLM) -> mb.Next:
    """Finds the answer letter in the last message, with a model, since people and models do not keep to forms."""
    turn = row.state.coral_turns[-1]
    reply = await llm.chat(extraction(turn))
    turn.answer = parse_answer(reply.text, len(row.state.options))
    return mb.to("matcher")


@flow.role
async def matcher(row: mb.Row[Discussion], config: CoralConfig) -> mb.Next | mb.Outcome:
    """Ends the discussion when both agents' latest answers are the same, or when its turns are used up."""
    turns = row.state.coral_turns
    row.state.coral_agreed = agreed_answer(turns)
    if row.state.coral_agreed is not None:
        return mb.success("agreement")
    if len(turns) >= config.max_turns:
        return mb.filtered("no_agreement")
    if turns[-1].agent == "solver":
        return mb.to("reviewer")
    return mb.to("solver")


@flow.metrics
def measure(state: Discussion, _: Any) -> Mapping[str, float]:
    """Agreement over all rows; whether it was the right answer, over those that agreed and know it; turns."""
    measured = {"agreement": float(state.coral_agreed is not None), "turns": float(len(state.coral_turns))}
    if state.coral_agreed is not None and state.answer is not None:
        measured["agreement_correct"] = float(state.coral_agreed == state.answer)
    return measured
