"""Continuous batching as vLLM's scheduler does it, in steps without a clock; pure.

In each step every running sequence that is decoding computes one token, and what is left of the step's token
budget goes to prompts, in the order of arrival, a long one in chunks over several steps. A sequence says its first
token at the end of the step that completes its prompt. It holds a block of the KV cache for every 16 tokens; where
there is no block left to grow into, the youngest running sequence is preempted: it gives its blocks back, returns
to the head of the line, and computes its prompt and what it had said again.

Tokens are counted as ceil(characters / 4) per message. Full blocks stay findable by their content, chained to all
that stands before them, until their room is needed: a prompt that begins like an earlier prompt or answer starts
with those blocks computed. Its last token is always computed, so that there is something to decode from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .profiles import Profile

BLOCK_TOKENS = 16
CHARS_PER_TOKEN = 4
_BLOCK_CHARS = BLOCK_TOKENS * CHARS_PER_TOKEN


def count_tokens(text: str) -> int:
    """Tokens of one message, as the simulator counts them."""
    return -(-len(text) // CHARS_PER_TOKEN)


def block_keys(texts: Iterable[str]) -> list[int]:
    """A key for each full block of these messages; equal keys mean equal text up to the block's end."""
    whole = "".join(text + "\0" * (-len(text) % CHARS_PER_TOKEN) for text in texts)
    keys = []
    key = 0
    for end in range(_BLOCK_CHARS, len(whole) + 1, _BLOCK_CHARS):
        key = hash((key, whole[end - _BLOCK_CHARS : end]))
        keys.append(key)
    return keys


class Sequence:
    """One answer to be generated."""

    def __init__(self, prompt_tokens: int, output_tokens: int, keys: Seq[int] = ()) -> None:
        """`keys` are those of the full blocks of prompt and answer together; none: nothing is shared."""
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        """At least 1."""
        self.keys = keys
        self.generated = 0
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self.cached_tokens = 0
        """Of the prompt, found in the prefix cache when it was first admitted."""
        self.preemptions = 0
        self.admitted = False
        self.shared: list[int] = []
        self.private = 0
        self.examined = 0

    @property
    def tokens(self) -> int:
        """Prompt and what was said so far."""
        return self.prompt_tokens + self.generated

    @property
    def finished(self) -> bool:
        return self.generated >= self.output_tokens


class BlockPool:
    """The KV cache. A block is private, shared by its key, or idle: shared by nobody and free to be evicted."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._private = 0
        self._holders: dict[int, int] = {}
        self._idle: dict[int, None] = {}  # the one that was let go first is evicted first

    @property
    def used(self) -> int:
        """Blocks held by sequences."""
        return self._private + len(self._holders) - len(self._idle)

    def match(self, keys: Seq[int], most: int) -> int:
        """How many leading blocks are here."""
        count = 0
        for key in keys[:most]:
            if key not in self._holders:
                break
            count += 1
        return count

    def share(self, keys: Seq[int]) -> None:
        """Hold blocks that are here."""
        for key in keys:
            self._holders[key] += 1
            self._idle.pop(key, None)

    def take(self, count: int) -> bool:
        """Private blocks, evicting idle ones; False, and nothing is taken, if there are not enough."""
        if self.used + count > self.capacity:
            return False
        self._private += count
        while self._private + len(self._holders) > self.capacity:
            oldest = next(iter(self._idle))
            del self._idle[oldest], self._holders[oldest]
        return True

    def publish(self, key: int) -> bool:
        """Turn a private block into a shared one; False if there is one with this content already."""
        if key in self._holders:
            return False
        self._private -= 1
        self._holders[key] = 1
        return True

    def release(self, shared: Seq[int], private: int) -> None:
        """Let blocks go. The end of a prefix goes idle before its beginning, which more prompts have in common."""
        self._private -= private
        for key in reversed(shared):
            self._holders[key] -= 1
            if not self._holders[key]:
                self._idle[key] = None


class Engine:
    """One replica. `begin` a step, let `step_s` pass, `end` it; sequences that arrive meanwhile wait for the next."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.blocks = BlockPool(profile.kv_cache_tokens // BLOCK_TOKENS)
        self.running: list[Sequence] = []
        """In the order of admission."""
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self.prompt_tokens = 0
        """Of all sequences that have said their first token."""
        self.generation_tokens = 0
        self.prefix_queries = 0
        """Prompt tokens looked up in the prefix cache."""
        self.prefix_hits = 0
        self._planned: list[tuple[Sequence, int, int]] = []

    @property
    def cache_usage(self) -> float:
        """The share of the KV cache that running sequences hold, 0 to 1."""
        return self.blocks.used / self.blocks.capacity

    def submit(self, sequence: Sequence) -> None:
        """Line up. Raises `ValueError` for a sequence that could never run."""
        if sequence.prompt_tokens + sequence.output_tokens > self.profile.max_model_len or sequence.output_tokens < 1:
            raise ValueError(f"{sequence.prompt_tokens} + {sequence.output_tokens} tokens cannot run")
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence that nobody waits for any more."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._planned = [step for step in self._planned if step[0] is not sequence]
            self._release(sequence)

    def begin(self) -> float | None:
        """Plan a step; the seconds that it takes, or None if there is nothing to do."""
        self._planned = []
        budget = self.profile.max_num_batched_tokens
        preempted = False
        at = 0
        while at < len(self.running) and budget:
            sequence = self.running[at]
            tokens, further = self._share_of(sequence, budget)
            if self._grow(sequence, tokens + further):
                self._planned.append((sequence, tokens, further))
                budget -= tokens
                at += 1
            else:
                self._preempt(self.running.pop())
                preempted = True
        while self.waiting and not preempted and budget and len(self.running) < self.profile.max_num_seqs:
            sequence = self.waiting[0]
            self._find_prefix(sequence)
            tokens, further = self._share_of(sequence, budget)
            if not self._grow(sequence, tokens + further):
                self._release(sequence)
                break
            self._admit(self.waiting.popleft())
            self._planned.append((sequence, tokens, further))
            budget -= tokens
        if not self._planned:
            return None
        prefill = [tokens for sequence, tokens, _ in self._planned if tokens > 1 or not sequence.generated]
        return self.profile.step_s(len(self._planned) - len(prefill), sum(prefill))

    def end(self) -> list[Sequence]:
        """Finish the step; the sequences that have said something more in it. Finished ones are gone."""
        spoke = []
        for sequence, tokens, further in self._planned:
            sequence.computed += tokens
            if sequence.computed == sequence.tokens:
                if not sequence.generated:
                    self.prompt_tokens += sequence.prompt_tokens
                sequence.computed += further
                sequence.generated += 1 + further
                self.generation_tokens += 1 + further
                spoke.append(sequence)
            self._publish(sequence)
            if sequence.finished:
                self._release(sequence)
        self._planned = []
        if any(sequence.finished for sequence in spoke):
            self.running = [sequence for sequence in self.running if not sequence.finished]
        return spoke

    def _share_of(self, sequence: Sequence, budget: int) -> tuple[int, int]:
        """Tokens to compute now, and, where time stands still, those that may follow in the same step."""
        left = sequence.tokens - sequence.computed
        if left > budget:
            return budget, 0
        return left, sequence.output_tokens - sequence.generated - 1 if self.profile.timeless else 0

    def _find_prefix(self, sequence: Sequence) -> None:
        if not sequence.keys:
            return
        count = self.blocks.match(sequence.keys, (sequence.tokens - 1) // BLOCK_TOKENS)
        sequence.shared = list(sequence.keys[:count])
        self.blocks.share(sequence.shared)
        sequence.examined = count
        sequence.computed = count * BLOCK_TOKENS

    def _admit(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        if sequence.admitted:
            return
        sequence.admitted = True
        sequence.cached_tokens = len(sequence.shared) * BLOCK_TOKENS
        if self.profile.prefix_caching:
            self.prefix_queries += sequence.prompt_tokens
            self.prefix_hits += sequence.cached_tokens

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        held = len(sequence.shared) + sequence.private
        more = -(-(sequence.computed + tokens) // BLOCK_TOKENS) - held
        if not self.blocks.take(more):
            return False
        sequence.private += more
        return True

    def _publish(self, sequence: Sequence) -> None:
        for key in sequence.keys[sequence.examined : sequence.computed // BLOCK_TOKENS]:
            sequence.examined += 1
            if self.blocks.publish(key):
                sequence.private -= 1
                sequence.shared.append(key)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.shared, sequence.private)
        sequence.shared = []
        sequence.private = sequence.examined = sequence.computed = 0
