"""Every error that embedq raises, as a tree by who can fix it.

    EmbedqError
    ├── ProducerError          the call is wrong; sending it again gives the same error
    │   ├── InvalidInput       an argument: type, value or content
    │   ├── JobTooLarge        too many texts or bytes for one job
    │   ├── UnknownModel       no worker serves a model of that name
    │   ├── BadSource          a file of a dataset is not what the dataset says it is
    │   └── WouldBlock         a task on embedq's own workers would wait there for another job
    ├── OperatorError          the installation is wrong; a worker does not start
    │   ├── InvalidSettings    a setting cannot be read, or two contradict each other
    │   ├── CannotLoadModel    a model directory is missing, incomplete, or not of a known kind
    │   └── ServerUnavailable  no Redis or Valkey server could be reached or started
    ├── QueueFull              the queue has no room for the job; later it may
    └── WorkerError            the worker failed; the same job may succeed elsewhere
        ├── DeviceFailure      the forward pass failed on the device
        ├── DeviceOutOfMemory  a single sequence does not fit the device's memory
        ├── StoreFailed        a store of files cannot be read or written now
        └── Poisoned           worker after worker died while it held the job

Along the path of a job:  produce ─ProducerError→ encode ─InvalidInput→ forward ─WorkerError→ result.

Each class takes exactly one string, so that the producer can rebuild a worker's error from the stored result as the
same class. A message names what is wrong, the limit, and the value given; it never contains a text or a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EmbedqError(Exception):
    """embedq failed."""

    def __init__(self, message: str | None = None) -> None:
        # Without a message, the class's docstring is the message.
        super().__init__(message or (type(self).__doc__ or "").strip())


class ProducerError(EmbedqError):
    """The call is wrong; sending it again gives the same error."""


class InvalidInput(ProducerError):
    """An argument of the call has the wrong type, value or content."""


class JobTooLarge(ProducerError):
    """The job holds more texts or bytes than one job may; split it into several jobs."""


class UnknownModel(ProducerError):
    """No worker serves a model of that name."""


class BadSource(ProducerError):
    """A file of a dataset is not what the dataset says it is."""


class WouldBlock(ProducerError):
    """A task on embedq's own workers would wait there for another job."""


class OperatorError(EmbedqError):
    """The installation is wrong; a worker does not start."""


class InvalidSettings(OperatorError):
    """A setting cannot be read, or two settings contradict each other."""


class CannotLoadModel(OperatorError):
    """A model directory is missing, incomplete, or not of a known kind."""


class ServerUnavailable(OperatorError):
    """No Redis or Valkey server could be reached or started."""


class QueueFull(EmbedqError):
    """The queue has no room for the job, which was not sent; later it may."""

    #: Seconds in which the workers present make room, by their measured speed; None if nobody has measured it.
    retry_after_s: float | None = None
    #: Of many jobs, the results of those that were sent before the queue was full.
    jobs: Sequence[Any] = ()


class WorkerError(EmbedqError):
    """The worker failed; the same job may succeed on another one."""


class DeviceFailure(WorkerError):
    """The forward pass failed on the device."""


class DeviceOutOfMemory(WorkerError):
    """A single sequence does not fit the device's memory."""


class StoreFailed(WorkerError):
    """A store of files cannot be read or written now."""


class Poisoned(WorkerError):
    """Worker after worker died while it held the job; it is not tried again."""
