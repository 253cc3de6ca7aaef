"""The pages as a workflow of three roles."""

from __future__ import annotations

import msgspec

import matrix_bus as mb

from . import stages


class Page(mb.State):
    """A page, and what the model said about it."""

    page: str
    said: dict[str, str] = msgspec.field(default_factory=dict)


flow = mb.Workflow("curation", state=Page, start="filter")
_SAMPLING = mb.Sampling(temperature=stages.TEMPERATURE, max_tokens=stages.MAX_TOKENS)


async def _asked(stage: str, row: mb.Row[Page], llm: mb.LLM) -> str:
    asked, page = stages.messages(stage, row.state.page)
    reply = await llm.chat([mb.system(asked["content"]), mb.user(page["content"])])
    row.state.said[stage] = reply.text
    return stages.judge(stage, reply.text)


@flow.role(name="filter", sampling=_SAMPLING)
async def filter_page(row: mb.Row[Page], llm: mb.LLM) -> mb.Next | mb.Outcome:
    end = await _asked("filter", row, llm)
    return mb.filtered(end) if end else mb.to("score")


@flow.role(sampling=_SAMPLING)
async def score(row: mb.Row[Page], llm: mb.LLM) -> mb.Next | mb.Outcome:
    end = await _asked("score", row, llm)
    return mb.filtered(end) if end else mb.to("question")


@flow.role(sampling=_SAMPLING)
async def question(row: mb.Row[Page], llm: mb.LLM) -> mb.Outcome:
    end = await _asked("question", row, llm)
    return mb.success() if end == stages.SUCCESS else mb.filtered(end)
