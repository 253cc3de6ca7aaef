"""What the agents and the extractor are told. The beginning of a conversation stays the same from turn to turn."""

from __future__ import annotations

import matrix_bus as mb

from .state import LETTERS, Discussion, Turn

_CLOSE = "End with one line: The answer is (X). X is the letter of an option."

_AGENTS = {
    "solver": (
        "You solve multiple-choice questions together with a reviewer. Think step by step, in a few short sentences, "
        f"and take objections seriously: keep your answer only if you can defend it. {_CLOSE}"
    ),
    "reviewer": (
        "You review a colleague's answer to a multiple-choice question. Work the question out yourself, say where the "
        f"colleague's reasoning is wrong or why it is right, and do not agree out of politeness. {_CLOSE}"
    ),
}

_EXTRACT = (
    "Report which option the author of a message chooses. Reply with its letter in parentheses and nothing else. "
    "If the author has not chosen one, reply: not sure yet"
)
# Two examples say more to a small model than a longer instruction; they are a prefix that every call shares.
_EXAMPLES = (
    ("Adding both lengths gives 14, which is the second option. The answer is (B).", "(B)"),
    ("It could be the first or the third. I have to think about it again.", "not sure yet"),
)


def question_text(state: Discussion) -> str:
    """The question with its options, one per line, lettered from A."""
    options = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, state.options, strict=False))
    return f"{state.question}\n{options}"


def conversation(agent: str, state: Discussion) -> list[mb.Message]:
    """The discussion as `agent` sees it: its own messages are the assistant's, the other's are the user's."""
    messages = [mb.system(_AGENTS[agent])]
    heard = [question_text(state)]
    for turn in state.coral_turns:
        if turn.agent == agent:
            messages += [mb.user("\n\n".join(heard)), mb.assistant(turn.text)]
            heard = []
        else:
            heard.append(f"Your colleague says:\n{turn.text}")
    return [*messages, mb.user("\n\n".join(heard))]


def extraction(turn: Turn) -> list[mb.Message]:
    """What the extractor is asked about a message."""
    shown = [message for text, letter in _EXAMPLES for message in (mb.user(f"Message:\n{text}"), mb.assistant(letter))]
    return [mb.system(_EXTRACT), *shown, mb.user(f"Message:\n{turn.text}")]
