"""JetStream, as much of it as rows need: confirmed publishing, look-ups, acks, pulling, streams and keys.

All errors of the broker and of its client library are translated here, at one edge, into `matrix_bus.errors`.
"""

from .connection import Bus, PubAck, Stored, delivery_facts, is_lost_race
from .pull import Lane

__all__ = ("Bus", "Lane", "PubAck", "Stored", "delivery_facts", "is_lost_race")
