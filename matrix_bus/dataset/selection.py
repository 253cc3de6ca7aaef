"""Which lines of a dataset become rows, with which of their fields, and in which order."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

import msgspec
from msgspec import Raw, Struct

from ..config import InputConfig
from ..errors import UsageError

T = TypeVar("T")

_fields = msgspec.json.Decoder(dict[str, Raw])


class Shard(Struct, frozen=True):
    """One of several equal parts of a dataset, by line number, or of an output, by row."""

    index: int = 1
    """From 1."""
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `2/4`, the second of four; everything where it is empty. Raises `UsageError`."""
        if not text:
            return cls()
        index, _, count = text.partition("/")
        if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) <= 10_000:
            return cls(int(index), int(count))
        raise UsageError(f"{text!r} names no shard: 2/4 is the second of four")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, number: int) -> bool:
        """Whether the line or row of this number, from 0, belongs to the shard."""
        return number % self.count == self.index - 1


class Selection:
    """`InputConfig`, applied: to line numbers, and to the lines themselves."""

    def __init__(self, config: InputConfig, shard: Shard | None = None, parsed: Iterable[str] = ()) -> None:
        self._shard = shard or Shard()
        self._skip = config.skip
        self._fields = frozenset([*config.fields, "id"]) if config.fields else frozenset[str]()
        self._rename = {new: old.split(".") for new, old in config.rename.items()}
        self.stop = None if config.limit is None else config.skip + config.limit
        """The number of the first line that comes too late; None: there is none."""
        self.parsed = frozenset(parsed)
        """Fields that the workflow wants as something else than text: a cell of CSV is read as JSON for them."""

    @property
    def columns(self) -> frozenset[str] | None:
        """Fields of a line that are looked at; None for all."""
        if not self._fields:
            return None
        return self._fields | {path[0] for path in self._rename.values()}

    def in_window(self, number: int) -> bool:
        """Whether the line is neither skipped nor beyond the limit."""
        return number >= self._skip and (self.stop is None or number < self.stop)

    def has(self, number: int) -> bool:
        """Whether the line is to become a row here, and not elsewhere or nowhere."""
        return self.in_window(number) and self._shard.has(number)

    def reshape(self, body: bytes) -> bytes:
        """The line with its chosen fields under their new names. Raises `msgspec.DecodeError`."""
        if not self._fields and not self._rename:
            return body
        found = _fields.decode(body)
        moved = {new: value for new, path in self._rename.items() if (value := at_path(found, path)) is not None}
        gone = {path[0] for path in self._rename.values() if len(path) == 1}
        kept = {
            name: value
            for name, value in found.items()
            if (name in self._fields if self._fields else True) and name not in gone
        }
        return msgspec.json.encode(kept | moved)


EVERYTHING = Selection(InputConfig())


def at_path(found: dict[str, Raw], path: list[str]) -> Raw | None:
    """The value at a path through objects; a name with dots in it counts as it stands."""
    if (whole := found.get(".".join(path))) is not None:
        return whole
    value = found.get(path[0])
    for word in path[1:]:
        try:
            value = _fields.decode(value).get(word) if value is not None else None
        except msgspec.DecodeError:
            return None
    return value


class Mixer(Generic[T]):
    """A buffer from which lines come out in random order: each that goes in pushes another one out."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = random.Random(seed)
        self._held: list[T] = []

    def swap(self, line: T) -> T | None:
        """Takes one in; gives one that has its turn, None while the buffer fills."""
        if len(self._held) < self._size:
            self._held.append(line)
            return None
        at = self._random.randrange(self._size)
        out, self._held[at] = self._held[at], line
        return out

    def rest(self) -> list[T]:
        """What is left at the end."""
        self._random.shuffle(self._held)
        left, self._held = self._held, []
        return left


def mixed(lines: Iterable[T], size: int, seed: int) -> Generator[T, None, None]:
    """The items in random order, as far as a buffer of `size` goes."""
    mixer: Mixer[T] = Mixer(size, seed)
    for line in lines:
        if (out := mixer.swap(line)) is not None:
            yield out
    yield from mixer.rest()
