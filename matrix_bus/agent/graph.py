"""A workflow as a picture: its roles, what they ask for, and where rows go from each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from ..llm import LLM
from .role import Role
from .workflow import Workflow

_COMPUTED = "?"
"""Where a row goes that the source does not tell."""


def draw(flow: Workflow[Any], form: str) -> str:
    """The workflow as `text`, or as the source of a `mermaid` or `dot` diagram. Raises `KeyError`."""
    return "\n".join(_FORMS[form](flow))


def _text(flow: Workflow[Any]) -> Iterator[str]:
    fields = ", ".join(
        field.encode_name if field.required else f"{field.encode_name}=…"
        for field in msgspec.structs.fields(flow.state)
    )
    yield f"{flow.name}: {fields}"
    rows = [(f"  {'▶' if name == flow.start else ' '} {name}", _asks(flow, role)) for name, role in flow.roles.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for (name, asks), role in zip(rows, flow.roles.values(), strict=True):
        ends = [_ending(kind, reason) for kind, reason in role.routes.outcomes]
        goes = [*role.routes.roles, *ends, *([] if role.routes.complete else [_COMPUTED])]
        yield f"{name:<{widths[0]}}  {asks:<{widths[1]}}  → {', '.join(goes)}"
    if any(not role.routes.complete for role in flow.roles.values()):
        yield f"{_COMPUTED}: computed by the handler; @flow.role(routes=[…]) says which roles it may be"


def _mermaid(flow: Workflow[Any]) -> Iterator[str]:
    def quoted(text: str) -> str:
        return '"' + text.replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;") + '"'

    yield "flowchart LR"
    yield f"  start(( )) --> role_{flow.start}"
    for name, role in flow.roles.items():
        asks = _asks(flow, role)
        label = quoted(name)[:-1] + (f"<br/><small>{quoted(asks)[1:-1]}</small>" if asks else "") + '"'
        yield f"  role_{name}[{label}]"
    for node, label in _endings(flow).items():
        yield f"  {node}([{quoted(label)}])"
    for source, target in _edges(flow):
        yield f"  {source} --> {target}"


def _dot(flow: Workflow[Any]) -> Iterator[str]:
    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    yield f"digraph {quoted(flow.name)} {{"
    yield "  rankdir=LR"
    yield "  start [shape=point]"
    for name, role in flow.roles.items():
        asks = _asks(flow, role)
        yield f"  {quoted(f'role_{name}')} [shape=box, label={quoted(name + (chr(10) + asks if asks else ''))}]"
    for node, label in _endings(flow).items():
        yield f"  {quoted(node)} [shape=box, style=rounded, label={quoted(label)}]"
    yield f"  start -> {quoted(f'role_{flow.start}')}"
    for source, target in _edges(flow):
        yield f"  {quoted(source)} -> {quoted(target)}"
    yield "}"


_FORMS: dict[str, Callable[[Workflow[Any]], Iterator[str]]] = {"text": _text, "mermaid": _mermaid, "dot": _dot}
FORMS = tuple(_FORMS)


def _endings(flow: Workflow[Any]) -> dict[str, str]:
    """The nodes where rows end, with their labels."""
    labels = dict.fromkeys(
        _ending(kind, reason) for role in flow.roles.values() for kind, reason in role.routes.outcomes
    )
    nodes = {f"end_{number}": label for number, label in enumerate(labels)}
    if any(not role.routes.complete for role in flow.roles.values()):
        nodes["end_computed"] = _COMPUTED
    return nodes


def _edges(flow: Workflow[Any]) -> Iterator[tuple[str, str]]:
    node_of = {label: node for node, label in _endings(flow).items()}
    for name, role in flow.roles.items():
        targets = [f"role_{target}" for target in role.routes.roles]
        targets += [node_of[_ending(kind, reason)] for kind, reason in role.routes.outcomes]
        targets += [] if role.routes.complete else ["end_computed"]
        for target in dict.fromkeys(targets):
            yield f"role_{name}", target


def _ending(kind: str, reason: str | None) -> str:
    return kind if reason == "" else f"{kind}: {'…' if reason is None else reason}"


def _asks(flow: Workflow[Any], role: Role) -> str:
    """What a role is called with beside its row, and where it runs if not on the event loop."""
    asks = [f"llm {role.model}"] if role.wants_model else []
    asks += [flow.resources[kind].name for _, kind in role.parameters if kind is not LLM and kind in flow.resources]
    return ", ".join(asks if role.mode == "async" else [*asks, f"in a {role.mode}"])
