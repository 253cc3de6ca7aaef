"""The vocabulary of failure, named by the boundary at which it happens.

Every error says what went wrong, with which value, and what to do about it. `transient` is the one fact that
decides how a hop settles: a transient error is retried with backoff, any other ends the row as `failed`.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from typing import ClassVar

_PACKAGE = os.path.dirname(__file__) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep


class MatrixBusError(Exception):
    """Base of every error that matrix-bus raises on purpose."""

    transient: ClassVar[bool] = False
    """True if the same work may succeed later without anybody changing anything."""


# --- what a user can mend: shown without a traceback, exit code 2 ---------------------------------------------


class UsageError(MatrixBusError):
    """A mistake that the user can mend; the message says how."""


class ConfigError(UsageError):
    """A setting is unknown, of the wrong type or out of range."""


class DatasetError(UsageError):
    """A dataset cannot be read."""


class WorkflowError(UsageError):
    """A workflow cannot be found or loaded, or declares something impossible."""


class RunError(UsageError):
    """A run cannot be found, exists already with other content, or is in the wrong state for the request."""


# --- the bus ----------------------------------------------------------------------------------------------------


class BusError(MatrixBusError):
    """The broker refused or did not answer."""

    transient = True


class BusUnavailable(BusError):
    """No broker answers at the address."""


class BusUnsuitable(BusError, UsageError):
    """The broker answers but cannot carry runs: too old, or without JetStream."""

    transient = False


class BusTimeout(BusError):
    """The broker did not confirm in time: whether the message was stored is unknown; repeat the same bytes."""


class NobodyListens(BusTimeout):
    """Nothing on the bus serves the subject: the stream does not exist, or the broker is still starting."""


class PublishRefused(BusError):
    """The broker refused to store a message.

    `code` is JetStream's `err_code`: 10071 fence or guard, 10077 store limit, 10158 and 10164 in process.
    """

    def __init__(self, subject: str, code: int, description: str) -> None:
        super().__init__(f"the broker refused {subject}: {description} (code {code})")
        self.subject = subject
        self.code = code
        self.description = description


class MessageTooLarge(PublishRefused):
    """The message is larger than the broker takes, so it is not sent: the broker would end the connection."""

    transient = False

    def __init__(self, subject: str, size: int, url: str, most: int) -> None:
        what = f"{size} bytes with headers, and the broker at {url} takes {most}: raise its max_payload"
        super().__init__(subject, 10054, what)


# --- models -----------------------------------------------------------------------------------------------------


class ModelError(MatrixBusError):
    """A model call failed."""


class EndpointGone(ModelError):
    """The endpoint refused the connection, dropped it or answered 5xx: another one may answer."""

    transient = True

    def __init__(self, message: str, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered
        """True for a 5xx: it is there, and may answer other requests."""


class RateLimited(ModelError):
    """The endpoint answered 429 or 503: it is busy. `retry_after_s` is what it asked for, if it did."""

    transient = True

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelTimeout(ModelError):
    """The call was sent, and no answer came within its timeout."""

    transient = True


class ReplyInvalid(ModelError):
    """The server answered something that is not a chat completion: broken JSON, or no choices."""

    transient = True


class ModelRefused(ModelError):
    """The server refused the request (4xx): the same request will be refused again."""


class ModelNotFound(ModelRefused):
    """The server does not serve the model by that name; the message lists what it has."""


class ContextLengthExceeded(ModelRefused):
    """The prompt, with the tokens asked for, does not fit in the model's context."""


class ModelAccessDenied(ModelRefused):
    """The key is missing, expired or not allowed to use the model. The key itself is never printed."""


# --- a row ------------------------------------------------------------------------------------------------------


class RowError(MatrixBusError):
    """The row itself cannot go on: its input does not fit the workflow, or its message is not readable."""


class LimitReached(MatrixBusError):
    """The row has gone on for as long as the run's `limits` allow."""


class StructureInvalid(ModelError):
    """A reply does not fit the type that `llm.parse` was asked for, nor does the one after it was told so."""


class HandlerError(MatrixBusError):
    """A role's handler broke the contract: wrong return type, unknown next role."""


class Retry(MatrixBusError):
    """Raise it in a handler to have the hop tried again: something that it needs is busy or down.

    `after_s` is how long to wait at least, in seconds; else attempts wait longer and longer. It counts as an attempt.
    """

    transient = True

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = after_s


class ResourceError(MatrixBusError):
    """A resource of the workflow could not be opened: what it connects to may be down."""

    transient = True


class WorkerCrashed(MatrixBusError):
    """The process that ran the handler died under it."""

    transient = True


def is_transient(error: BaseException) -> bool:
    """Whether a handler that raised this is called again; a timeout is, wherever it comes from."""
    return isinstance(error, TimeoutError) or (isinstance(error, MatrixBusError) and error.transient)


def decisive(error: Exception) -> Exception:
    """The error that decides how a hop settles.

    Of a group, as `asyncio.TaskGroup` raises it, that is the first which is not transient, else the first.
    """
    if not isinstance(error, ExceptionGroup):
        return error
    causes = [decisive(inner) for inner in error.exceptions]
    return next((cause for cause in causes if not is_transient(cause)), causes[0])


# --- telling about it -------------------------------------------------------------------------------------------


def user_frames(error: BaseException, most: int = 20) -> str:
    """The last frames of a traceback that are the user's: none of ours, nor what lies between ours and theirs."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PACKAGE, "<frozen "))
    ]
    while frames and frames[0].filename.startswith(_STDLIB) and "site-packages" not in frames[0].filename:
        del frames[0]
    return "".join(traceback.format_list(frames[-most:])).rstrip()
