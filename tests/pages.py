"""Web pages whose fate is known beforehand: a dataset, and what a simulated model says to each of them.

    python -m matrix_serving.simulator --profile instant --responder script:tests.pages:say

The shares of the fates are those of table 2 of "Matrix: Peer-to-Peer Multi-Agent Synthetic Data Generation Framework"
(arXiv 2511.21686).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEB_PAGES = Path(__file__).parents[2] / "shared" / "data" / "web_pages.jsonl.zst"
SHARES = {
    "filter_by_en": 0.0368,
    "filter_by_score": 0.0044,
    "filter_by_no_boxed_answer": 0.0019,
    "success": 0.0545,
}
"""The rest, 90.24 %, ends as `filter_by_classifier`."""
_KEY_CHARS = 150


def pages() -> Iterator[dict[str, Any]]:
    """The pages as they are."""
    from matrix_bus.dataset import Line, read

    for line in read(str(WEB_PAGES)):
        assert isinstance(line, Line)
        yield json.loads(line.body)


@functools.cache
def fates() -> dict[str, str]:
    """Beginning of a page -> how it ends; in the order of their hashes each fate gets its share, rounded.

    Pages that begin alike, a few, cannot be told apart by a model's prompt, so they all end in the same way.
    """
    counts = Counter(key(page["text"]) for page in pages())
    alone = sorted((k for k, n in counts.items() if n == 1), key=lambda k: hashlib.sha256(k.encode()).hexdigest())
    found = dict.fromkeys(counts, "filter_by_classifier")
    at = 0
    for fate, share in SHARES.items():
        size = round(share * counts.total())
        found |= dict.fromkeys(alone[at : at + size], fate)
        at += size
    return found


def key(page: str) -> str:
    """What a page is known by."""
    return page[:_KEY_CHARS]


def lines() -> Iterator[dict[str, Any]]:
    """The dataset: pages with the probability that they are English."""
    for page in pages():
        english = 0.31 if fates()[key(page["text"])] == "filter_by_en" else 0.97
        yield {"text": page["text"], "url": page["url"], "language_id_whole_page_fasttext": {"en": english, "de": 0.01}}


def say(request: dict[str, Any]) -> str:
    """The model: it knows the role by the system prompt, and the fate by the page."""
    told, asked = request["messages"][0]["content"], request["messages"][1]["content"]
    if told.startswith("Answer the question"):
        return "One step, and another." + ("" if "unanswered" in asked else " So it is \\boxed{\\frac{1}{42}}.")
    fate = fates()[key(asked.removeprefix("Page:\n"))]
    if told.startswith("You sort"):
        return "No." if fate == "filter_by_classifier" else "Yes"
    if told.startswith("You judge"):
        least = 0 if fate == "filter_by_score" else 3
        names = ("completeness", "difficulty", "technical_correctness", "reasoning")
        return json.dumps({"analysis": "Long enough.", **dict.fromkeys(names, 4), "reasoning": least})
    kind = "unanswered" if fate == "filter_by_no_boxed_answer" else "answered"
    asked_of = {"question": f"What is the {kind} question?", "category": "mathematics", "answer": "1/42"}
    return f"```json\n{json.dumps(asked_of)}\n```"
