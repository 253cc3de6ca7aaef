"""What a user writes: a workflow, its state, and one handler per role.

class Draft(State):
    topic: str
    text: str = ""

flow = Workflow("draft", state=Draft, start="writer")

@flow.role
async def writer(row: Row[Draft], llm: LLM) -> Next | Outcome: ...
"""

from __future__ import annotations

from .graph import draw
from .large import Large, Store, encode_state
from .load import identify, installed_workflows, load_workflow
from .resource import Resource
from .role import Role
from .row import Next, Outcome, Row, State, failed, filtered, success, to
from .run_row import RowResult
from .workflow import Workflow

__all__ = (
    "Large",
    "Next",
    "Outcome",
    "Resource",
    "Role",
    "Row",
    "RowResult",
    "State",
    "Store",
    "Workflow",
    "draw",
    "encode_state",
    "failed",
    "filtered",
    "identify",
    "installed_workflows",
    "load_workflow",
    "success",
    "to",
)
