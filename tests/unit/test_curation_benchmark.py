"""The simulated model says of each page what the benchmark expects, and the workflow takes it so."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from benchmarks.curation import pages, stages
from benchmarks.curation.workflow import flow


def _ends_as(page: str) -> str:
    end = ""
    for stage in stages.STAGES:
        end = stages.judge(stage, pages.respond(stages.body(stage, page)))
        if end:
            break
    return end


def test_pages_end_as_expected() -> None:
    texts = list(pages.pages(3000, seed=5))
    assert len(set(texts)) == len(texts)
    assert Counter(map(_ends_as, texts)) == pages.expected(3000, seed=5)
    assert 0.8 < sum(pages.fate(text) == "filter_by_classifier" for text in texts) / len(texts) < 0.95


async def test_the_workflow_ends_pages_alike() -> None:
    chosen = {pages.fate(text): text for text in pages.pages(3000, seed=5)}
    assert chosen.keys() == {*stages.REASONS, stages.SUCCESS}

    def model(request: Any) -> str:
        return pages.respond({"messages": msgspec.to_builtins(request.messages)})

    for end, text in chosen.items():
        found = await flow.run_row({"page": text}, llm=model)
        assert (found.reason or found.kind) == end
