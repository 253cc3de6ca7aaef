"""Values of a state that are kept out of the row's message when they are big."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar, get_args, get_origin

import msgspec
from msgspec import Raw

from ..errors import HandlerError
from ..orchestrator import REF_MARK, Ref, ref_json

T = TypeVar("T")
_MARK_KEY = "$large"


class Store(Protocol):
    """Where large values lie."""

    async def get(self, ref: Ref) -> bytes:
        """The value's JSON. Raises `RowError` if it is not there."""
        ...


class Large(Generic[T]):
    """A value of a state that may be big: `page: Large[str]`.

    It travels in the row's message while that is small, else it lies in the run's object store, is written there
    once, and is read by those who ask. It is not changed in place: `row.state.page = Large(new_text)`.
    """

    __slots__ = ("_kind", "_ref", "_store", "_value")

    def __init__(self, value: T) -> None:
        self._value: T | msgspec.UnsetType = value
        self._ref: Ref | None = None
        self._store: Store | None = None
        self._kind: Any = Any

    @classmethod
    def _stored(cls, ref: Ref, kind: Any, store: Store | None) -> Large[T]:
        large = cls.__new__(cls)
        large._value, large._ref, large._store, large._kind = msgspec.UNSET, ref, store, kind
        return large

    async def get(self) -> T:
        """The value; read from the object store the first time, where it lies there.

        Raises `RowError` if the store does not have it any more.
        """
        if self._value is msgspec.UNSET and self._ref is not None and self._store is not None:
            self._value = msgspec.json.decode(
                await self._store.get(self._ref), type=self._kind, dec_hook=decoding(None)
            )
        return self.value

    @property
    def value(self) -> T:
        """The value, where it is at hand: in plain `def` handlers, in metrics, and after `await get()`.

        Raises `HandlerError` elsewhere.
        """
        if isinstance(self._value, msgspec.UnsetType):
            raise HandlerError("this Large value lies in the object store: read it with `await ….get()` first")
        return self._value

    def __repr__(self) -> str:
        return f"Large({self._ref or self._value!r:.80})"


def decoding(store: Store | None) -> Any:
    """A `dec_hook` for states: what it makes of references reads from `store`."""

    def hook(kind: Any, found: Any) -> Any:
        if (get_origin(kind) or kind) is not Large:
            raise NotImplementedError(f"a state cannot hold {kind!r}: use msgspec structs and builtin types")
        (inner,) = get_args(kind) or (Any,)
        if isinstance(found, dict) and found.keys() == {_MARK_KEY}:
            return Large._stored(msgspec.convert(found[_MARK_KEY], Ref), inner, store)
        return Large(msgspec.convert(found, inner, dec_hook=hook))

    return hook


def _inline(found: Any) -> Any:
    if not isinstance(found, Large):
        raise NotImplementedError(
            f"a state cannot hold a {type(found).__name__}: use msgspec structs and builtin types"
        )
    return Raw(ref_json(found._ref)) if found._ref is not None else found._value


encode_state = msgspec.json.Encoder(enc_hook=_inline).encode
"""The state's wire form; values that are in the object store stay there."""


def lighten(state: msgspec.Struct, least_bytes: int) -> tuple[bytes, list[bytes]]:
    """(the state's wire form with a reference in place of every `Large` of `least_bytes` or more, their bodies).

    A reference is known before its body is stored: it is the body's hash.
    """
    bodies: list[bytes] = []

    def hook(found: Any) -> Any:
        if not isinstance(found, Large) or found._ref is not None:
            return _inline(found)
        body = encode_state(found._value)
        if len(body) < least_bytes and not body.startswith(REF_MARK):
            return Raw(body)
        bodies.append(body)
        return Raw(ref_json(Ref.of(body)))

    return msgspec.json.encode(state, enc_hook=hook), bodies
