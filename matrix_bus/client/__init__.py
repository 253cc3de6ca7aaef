"""matrix-bus inside another program: submit rows to workflows and follow their outcomes, without their code.

Nothing here touches the host: no event loop policy, no logging setup, no signal handlers, no config files.
"""

from .blocking import BlockingClient, BlockingRun, connect_blocking
from .client import Client, connect
from .handle import Rejections, Run, Status
from .rows import Rows

__all__ = (
    "BlockingClient",
    "BlockingRun",
    "Client",
    "Rejections",
    "Rows",
    "Run",
    "Status",
    "connect",
    "connect_blocking",
)
