"""The exceptions of Penstock: one small tree, shared by client, worker and engine.

Every message names the field, the value, the limit and the remedy, because the reader is usually looking at a log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock_core.protocol.jobs import JobResult


class PenstockError(Exception):
    """Base of every error Penstock raises on purpose."""


class InvalidRequest(PenstockError, ValueError):
    """A request was refused at the door; nothing was stored.

    Attributes:
        field: dotted name of the offending field, such as `sampling.temperature`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, str]]:
        return type(self), (self.field, self.message)


class InvalidConfiguration(PenstockError, ValueError):
    """A setting of the engine or of a process is wrong, or does not fit the machine or the model.

    Attributes:
        field: dotted name of the setting, such as `page.num_pages`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[InvalidConfiguration], tuple[str, str]]:
        return type(self), (self.field, self.message)


class EngineFailed(PenstockError):
    """The engine cannot compute any further step (a rank of its group is gone): its process must be started anew."""


class QueueFull(PenstockError):
    """The queue or the tenant is at its bound; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[QueueFull], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)


class JobNotFound(PenstockError, KeyError):
    """No such job: never submitted, submitted to another queue or tenant, or its retention time has passed."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "job not found"


class JobError(PenstockError):
    """A job ended, but not with a completed result.

    Attributes:
        job_id: the job.
        message: the reason in words.
        code: stable machine-readable reason, such as `invalid_request`, `poison` or `deadline`.
        result: what the job had produced when it ended, where its worker could still say so.
    """

    def __init__(self, job_id: str, message: str, code: str, result: JobResult | None = None) -> None:
        super().__init__(f"job {job_id}: {message}")
        self.job_id = job_id
        self.message = message
        self.code = code
        self.result = result

    def __reduce__(self) -> tuple[type[JobError], tuple[str, str, str, JobResult | None]]:
        return type(self), (self.job_id, self.message, self.code, self.result)


class JobFailed(JobError):
    """The job ended in state `failed`: the worker could not run it, and retries (if any) are spent."""


class JobDead(JobFailed):
    """The job was dead-lettered: it crashed its workers, or could not be decoded."""


class JobCancelled(JobError):
    """The job was cancelled before it completed."""


class JobExpired(JobError):
    """The job's deadline passed before it completed."""


class ResultTimeout(PenstockError, TimeoutError):
    """`result(timeout=...)` gave up waiting; the job itself goes on."""


class BrokerUnavailable(PenstockError, ConnectionError):
    """Redis could not be reached, or refused the connection."""


class ClientClosed(BrokerUnavailable):
    """This client object was closed; make a new one."""


class BrokerMisconfigured(PenstockError):
    """Redis answers, but is set up in a way that can lose accepted jobs (no AOF, an evicting memory policy)."""


class UndecodableRecord(PenstockError, ValueError):
    """Bytes read from Redis are not a record of a protocol version this side understands."""


class RecordTooLarge(PenstockError, ValueError):
    """A record to be written is over the protocol's size limit; readers would refuse it."""
