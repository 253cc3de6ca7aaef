"""A server with the timing of a model and none of its answers: for capacity planning and benchmarks without GPUs."""

from __future__ import annotations

from .engine import Engine, Sequence
from .profiles import PROFILES, Profile, load_profile
from .server import run

__all__ = ("PROFILES", "Engine", "Profile", "Sequence", "load_profile", "run")
