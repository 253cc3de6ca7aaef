"""A run from the outside: submit rows, follow it, collect its outcomes.

None of this must stay alive for the run to go on; all of it can be repeated by anybody at any time.
"""

from ..dataset import Written
from .following import collect, outcomes, write_manifest
from .opening import new_record, open_run
from .shaping import Shape, parse_fields
from .submission import Submitted, submit
from .tally import EndpointTally, Tally

__all__ = (
    "EndpointTally",
    "Shape",
    "Submitted",
    "Tally",
    "Written",
    "collect",
    "new_record",
    "open_run",
    "outcomes",
    "parse_fields",
    "submit",
    "write_manifest",
)
