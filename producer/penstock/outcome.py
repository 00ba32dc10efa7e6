"""How a job ended, as a caller sees it: a result, or one of the typed errors. No I/O."""

from __future__ import annotations

from penstock_core.protocol.errors import JobCancelled, JobDead, JobError, JobExpired, JobFailed
from penstock_core.protocol.events import JobEnded
from penstock_core.protocol.jobs import JobResult, JobState
from penstock_core.protocol.transitions import JobStatus

_ERRORS: dict[JobState, type[JobError]] = {
    JobState.FAILED: JobFailed,
    JobState.DEAD: JobDead,
    JobState.CANCELLED: JobCancelled,
    JobState.EXPIRED: JobExpired,
}


def result_of(job_id: str, ended: JobEnded) -> JobResult:
    """The result of a completed job; raises `JobFailed`, `JobDead`, `JobCancelled` or `JobExpired` of any other.

    The error carries the job's partial result, if there is one.
    """
    if ended.state is JobState.COMPLETED:
        return ended.result or JobResult()
    error = _ERRORS[ended.state]
    if ended.failure is None:
        raise error(job_id, f"ended as {ended.state}", str(ended.state), ended.result)
    raise error(job_id, ended.failure.message, ended.failure.code, ended.result)


def describe(status: JobStatus) -> str:
    """Where a job that has not ended stands, in words, with what can be done about it."""
    match status.state:
        case JobState.QUEUED:
            return "it is queued, and no worker with room has taken it yet (is one running for this queue?)"
        case JobState.DELAYED:
            reason = f" after an error ({status.failure.message})" if status.failure is not None else ""
            return f"it is delayed{reason}"
        case JobState.RUNNING:
            stopping = ", and has been asked to stop" if status.cancelling else ""
            return (
                f"it is running on worker {status.owner} (attempt {status.attempt}, {status.tokens} tokens so far)"
                f"{stopping}; if that worker has died, another takes over once its lease has run out"
            )
        case _:
            return f"it is {status.state}"
