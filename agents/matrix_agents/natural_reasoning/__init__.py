"""Natural reasoning: web pages filtered, scored and turned into exam questions with answers.

    filter ─▶ score ─▶ question

The second case of "Matrix: Peer-to-Peer Multi-Agent Synthetic Data Generation Framework" (arXiv 2511.21686, §5.2).
Most pages end at the first role, and they differ in size by orders of magnitude.
"""

from __future__ import annotations

from .workflow import flow

__all__ = ("flow",)
