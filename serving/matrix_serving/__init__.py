"""Model servers for matrix-bus: the embedded one that a user's terminals share, and one in the foreground.

The latter is `matrix_serving.serve.serve`; not imported here, because `.llama` is run with `python -m`.
"""

from __future__ import annotations

from .local import local_model
from .model import MODEL_NAME, model_facts, resolve_model, served_name

__all__ = ("MODEL_NAME", "local_model", "model_facts", "resolve_model", "served_name")
