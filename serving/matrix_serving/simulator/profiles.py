"""How fast a simulated server is, and where the numbers come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from matrix_bus.errors import ConfigError

from ..llama import CONTEXT_TOKENS, PARALLEL
from .engine import BLOCK_TOKENS

_Positive = Annotated[int, Meta(gt=0)]
_Seconds = Annotated[float, Meta(ge=0)]


class Profile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The timing and the limits of one replica.

    A step takes `base_s + per_seq_s * sequences decoding + prompt tokens / prefill_tokens_per_s`. Raises
    `ConfigError` if the numbers contradict each other.
    """

    name: str
    source: Annotated[str, Meta(min_length=1)]
    """Where the numbers come from: what was measured, on what, when; or that they are an assumption."""
    prefill_tokens_per_s: Annotated[float, Meta(gt=0)] | None
    """Prompt tokens that are not in the prefix cache, per second; None: they cost no time."""
    base_s: _Seconds
    """Of one decode step, whatever the batch."""
    per_seq_s: _Seconds
    """Of one decode step, for each sequence in it."""
    max_num_seqs: _Positive
    """Sequences that run at a time; the others wait."""
    max_model_len: _Positive
    """Tokens of one call, prompt and answer together."""
    kv_cache_tokens: _Positive
    """Room for the tokens of all running sequences, in blocks of 16."""
    max_num_batched_tokens: _Positive = 2048
    """Tokens computed in one step; a longer prompt takes several."""
    prefix_caching: bool = True
    output_tokens: str = ""
    """Length of the answers: see `answers.lengths`. Empty: as long as what the responder says."""

    def __post_init__(self) -> None:
        if self.max_model_len > self.kv_cache_tokens // BLOCK_TOKENS * BLOCK_TOKENS:
            raise ConfigError(
                f"profile {self.name!r}: a sequence of max_model_len={self.max_model_len} tokens does not fit in "
                f"kv_cache_tokens={self.kv_cache_tokens}; lower the one or raise the other"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"profile {self.name!r}: max_num_batched_tokens={self.max_num_batched_tokens} is less than "
                f"max_num_seqs={self.max_num_seqs}, so a full batch could not take a step; raise it"
            )

    @property
    def timeless(self) -> bool:
        """Whether nothing takes any time."""
        return self.base_s == 0 and self.per_seq_s == 0 and self.prefill_tokens_per_s is None

    def step_s(self, decoding: int, prefill_tokens: int) -> float:
        """Seconds of one step."""
        prefill_s = prefill_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0
        return (self.base_s + self.per_seq_s * decoding if decoding else 0.0) + prefill_s


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="embedded",
            source=(
                "SmolLM2-135M-Instruct under llama.cpp on two CPU cores, measured by this project: 325 prompt tokens "
                "a second, 85 tokens/s of one call and 180 of 16 at once, from which base_s and per_seq_s follow; the "
                "limits are those of the embedded server; that calls share the cache is vLLM's model, not llama.cpp's"
            ),
            prefill_tokens_per_s=325,
            base_s=0.00662,
            per_seq_s=0.00514,
            max_num_seqs=PARALLEL,
            max_model_len=CONTEXT_TOKENS,
            kv_cache_tokens=PARALLEL * CONTEXT_TOKENS,
        ),
        Profile(
            name="instant",
            source="no machine: it answers at once, so that a benchmark measures the client and not the model",
            prefill_tokens_per_s=None,
            base_s=0,
            per_seq_s=0,
            max_num_seqs=1 << 16,
            max_model_len=1 << 17,
            kv_cache_tokens=1 << 26,
            max_num_batched_tokens=1 << 26,
            prefix_caching=False,
        ),
    )
}


def load_profile(name: str) -> Profile:
    """A profile by its name, or from a `.yaml`, `.yml` or `.json` file. Raises `ConfigError`."""
    if (known := PROFILES.get(name)) is not None:
        return known
    path = Path(name)
    if path.suffix not in {".yaml", ".yml", ".json"}:
        raise ConfigError(f"there is no profile {name!r}: name one of {', '.join(PROFILES)}, or a .yaml or .json file")
    try:
        text = path.read_bytes()
        found: Any = msgspec.json.decode(text) if path.suffix == ".json" else msgspec.yaml.decode(text)
        return msgspec.convert(found, Profile)
    except OSError as error:
        raise ConfigError(f"cannot read the profile {name}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not a profile: {error}") from None
