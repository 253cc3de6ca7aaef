"""What the models are told. The page comes last, so that all calls of a role begin with the same tokens."""

from __future__ import annotations

import matrix_bus as mb

from .state import CATEGORIES

_FILTER = (
    "You sort web pages for a collection of exam questions that take reasoning. Say Yes if the page explains or works "
    "out something in a field of study - a derivation, a method, an argument, a worked problem, a mechanism - so that "
    "a demanding question with a definite answer could be written from it. Say No to news, shops, menus, lists of "
    "links, gossip, plain reference without explanation, and text that is broken. Answer with one word, Yes or No."
)

_SCORE = (
    "You judge whether a web page is good material for a demanding exam question. First write a short analysis, then "
    "give whole numbers from 0 (nothing of it) to 5 (excellent):\n"
    "- completeness: everything that is needed to understand and answer such a question is on the page\n"
    "- difficulty: it takes knowledge of the field at the level of a university\n"
    "- technical_correctness: statements, formulas and steps are right\n"
    "- reasoning: it takes several steps of thought, not only looking a fact up\n"
    "Answer as one JSON object with the keys analysis, completeness, difficulty, technical_correctness, reasoning."
)

_QUESTION = (
    "You write exam questions from web pages. Write one demanding question that the page gives rise to and that can be "
    "understood without the page: bring in every assumption and number that it needs, do not speak of the page or its "
    "author. It has one definite answer. Take the answer from the page, in a sentence or a formula; leave it empty if "
    "the page has none. Leave the question empty if the page is no material for one. "
    f"The category is one of: {', '.join(CATEGORIES)}.\n"
    "Answer as one JSON object with the keys question, category, answer."
)

_SOLVE = (
    "Answer the question. Think step by step, write the steps down, check them, and end with the final answer, as "
    "short as it can be, in \\boxed{}."
)


def filtering(page: str) -> list[mb.Message]:
    """Whether a page is of use."""
    return [mb.system(_FILTER), mb.user(f"Page:\n{page}\n\nYes or No?")]


def scoring(page: str) -> list[mb.Message]:
    """How good it is."""
    return [mb.system(_SCORE), mb.user(f"Page:\n{page}")]


def questioning(page: str) -> list[mb.Message]:
    """What could be asked."""
    return [mb.system(_QUESTION), mb.user(f"Page:\n{page}")]


def solving(question: str) -> list[mb.Message]:
    """What the answer is. The page is not shown, nor its answer: what agrees with it then agrees for a reason."""
    return [mb.system(_SOLVE), mb.user(question)]
