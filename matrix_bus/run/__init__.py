"""A run from the outside: submit rows, follow it, collect its outcomes.

None of this must stay alive for the run to go on; all of it can be repeated by anybody at any time.
"""

from .following import collect, outcomes, write_manifest
from .opening import new_record, open_run
from .submission import Submitted, submit
from .tally import EndpointTally, Tally

__all__ = (
    "EndpointTally",
    "Submitted",
    "Tally",
    "collect",
    "new_record",
    "open_run",
    "outcomes",
    "submit",
    "write_manifest",
)
