"""JetStream, as much of it as rows need: confirmed publishing, look-ups, acks, pulling, streams and keys.

All errors of the broker and of its client library are translated here, at one edge, into `matrix_bus.errors`.
"""

from .group import unwrapped_group
from .jetstream import Bus
from .patience import FIRST_WAIT_S, note_refusal, patiently, pause
from .pull import Lane
from .server import without_password
from .streams import create_bucket, create_stream
from .wire import STREAM_NOT_FOUND, Headers, Message, PubAck, Stored, delivery_facts, fence, fence_lines, is_lost_race

__all__ = (
    "FIRST_WAIT_S",
    "STREAM_NOT_FOUND",
    "Bus",
    "Headers",
    "Lane",
    "Message",
    "PubAck",
    "Stored",
    "create_bucket",
    "create_stream",
    "delivery_facts",
    "fence",
    "fence_lines",
    "is_lost_race",
    "note_refusal",
    "patiently",
    "pause",
    "unwrapped_group",
    "without_password",
)
