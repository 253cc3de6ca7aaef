"""Coral, collaborative reasoning: two agents discuss a multiple-choice question until they agree.

    solver ─▶ extractor ─▶ matcher ─▶ reviewer ─▶ extractor ─▶ matcher ─▶ solver ─▶ …

The first case of "Matrix: Peer-to-Peer Multi-Agent Synthetic Data Generation Framework" (arXiv 2511.21686, §5.1).
"""

from __future__ import annotations

from .workflow import flow

__all__ = ("flow",)
