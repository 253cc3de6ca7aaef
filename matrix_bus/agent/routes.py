"""Where a handler sends its rows, as far as its source says: read before any row travels."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from msgspec import Struct

from .row import Next, Outcome, failed, filtered, success, to

_KINDS: dict[Any, str] = {success: "success", filtered: "filtered", failed: "failed"}


class Routes(Struct, frozen=True):
    """What a handler's return statements say."""

    roles: tuple[str, ...] = ()
    """The roles it sends rows to, in the order of the source."""
    outcomes: tuple[tuple[str, str | None], ...] = ()
    """Kind and reason of the outcomes it returns; None for a reason that is computed."""
    complete: bool = True
    """False if it may return what cannot be read from the source."""


def read_routes(handler: Callable[..., Any]) -> Routes:
    """The routes of a handler, with those of the functions of its own module whose result it returns."""
    reader = _Reader()
    reader.function(inspect.unwrap(handler))
    return Routes(tuple(dict.fromkeys(reader.roles)), tuple(dict.fromkeys(reader.outcomes)), reader.complete)


class _Reader:
    def __init__(self) -> None:
        self.roles: list[str] = []
        self.outcomes: list[tuple[str, str | None]] = []
        self.complete = True
        self._seen: set[Callable[..., Any]] = set()

    def function(self, function: Callable[..., Any]) -> None:
        if function in self._seen:
            return
        self._seen.add(function)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError, TypeError):  # no source: routes are checked when they are taken
            self.complete = False
            return
        scope = _Scope(function, tree)
        for value in scope.returned:
            self._decision(value, scope, ())

    def _decision(self, node: ast.expr, scope: _Scope, through: Sequence[str]) -> None:
        """Takes note of what an expression may be that is returned; `through` are the variables looked through."""
        match node:
            case ast.Await(value=value) | ast.NamedExpr(value=value):
                self._decision(value, scope, through)
            case ast.IfExp(body=one, orelse=other):
                self._decision(one, scope, through)
                self._decision(other, scope, through)
            case ast.Name(id=name) if name in scope.assigned and name not in through:
                for value in scope.assigned[name]:
                    self._decision(value, scope, (*through, name))
            case ast.Call():
                self._call(node, scope)
            case _:
                self.complete = False

    def _call(self, node: ast.Call, scope: _Scope) -> None:
        called = scope.meaning(node.func)
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if called is to or called is Next:
            names = scope.texts(arguments[0]) if len(arguments) == 1 else []
            if names:
                self.roles += names
            else:
                self.complete = False
        elif called is Outcome or (inspect.isfunction(called) and called in _KINDS):
            if called is Outcome:
                kinds, arguments = scope.texts(arguments[0]) if arguments else [], arguments[1:]
            else:
                kinds = [_KINDS[called]]
            reasons: list[str | None] = [*scope.texts(arguments[0])] if arguments else [""]
            self.outcomes += [(kind, reason) for kind in kinds for reason in reasons or [None]]
            self.complete &= bool(kinds)
        elif inspect.isfunction(called) and called.__module__ == scope.module:
            self.function(inspect.unwrap(called))
        else:
            self.complete = False


class _Scope:
    """One function's source, and what the names in it mean where it was written."""

    def __init__(self, function: Callable[..., Any], tree: ast.Module) -> None:
        self.module = function.__module__
        self._names: dict[str, Any] = {**getattr(function, "__globals__", {})}
        if inspect.isfunction(function):
            self._names.update(inspect.getclosurevars(function).nonlocals)
        self.returned: list[ast.expr] = []
        self.assigned: dict[str, list[ast.expr]] = {}
        top = tree.body[0]
        self._parameters: set[str] = set()
        if isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef):
            self._parameters = {node.arg for node in ast.walk(top.args) if isinstance(node, ast.arg)}
            for node in _own_nodes(top):
                self._note(node)

    def _note(self, node: ast.AST) -> None:
        match node:
            case ast.Return(value=value) if value is not None:
                self.returned.append(value)
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):  # of a tuple that is taken apart nothing is known
                            self.assigned.setdefault(name.id, []).append(value if name is target else target)
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                self.assigned.setdefault(name, []).append(value)
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                self.assigned.setdefault(name, []).append(value)
            case ast.For(target=target) | ast.AsyncFor(target=target):
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        self.assigned.setdefault(name.id, []).append(target)

    def meaning(self, node: ast.expr) -> Any:
        """What a name or a dotted name stands for; None if it is the function's own, or not to be found."""
        match node:
            case ast.Name(id=name) if name not in self.assigned and name not in self._parameters:
                return self._names.get(name)
            case ast.Attribute(value=value, attr=name):
                owner = self.meaning(value)
                # Only of modules and classes: an attribute of anything else may change, or run code.
                return getattr(owner, name, None) if inspect.ismodule(owner) or inspect.isclass(owner) else None
        return None

    def texts(self, node: ast.expr, through: tuple[str, ...] = ()) -> list[str]:
        """The strings that an expression may be; none if one of them cannot be told."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.IfExp(body=one, orelse=other):
                found = [self.texts(one, through), self.texts(other, through)]
            case ast.Name(id=name) if name in self.assigned and name not in through:
                found = [self.texts(value, (*through, name)) for value in self.assigned[name]]
            case _:
                known = self.meaning(node)
                return [str(known)] if isinstance(known, str) else []
        return [text for texts in found for text in texts] if all(found) else []


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function in the order of the source, without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own_nodes(node)
