"""Runs from outside: paused, changed, ended, and their failed rows sent again; and what nobody could read."""

from .changing import change, pause, resume
from .dead import DeadLetter, dead_letters, drop, find, requeue
from .ending import cancel, free_unreferenced, purge
from .retrying import retry_failed

__all__ = (
    "DeadLetter",
    "cancel",
    "change",
    "dead_letters",
    "drop",
    "find",
    "free_unreferenced",
    "pause",
    "purge",
    "requeue",
    "resume",
    "retry_failed",
)
