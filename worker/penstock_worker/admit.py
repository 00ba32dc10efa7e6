"""From a claimed job to what becomes of it here: run it, refuse it, or find that its log is already complete.

A pure function of the job and the model: decode, check the model's name, tokenize, validate, read the token log.
Whatever is wrong with a job ends in a verdict with a reason, so that no client is left waiting and no worker dies of
it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from penstock_core.pipeline import EngineRequest
from penstock_core.protocol.codec import decode_request
from penstock_core.protocol.errors import InvalidRequest, UndecodableRecord
from penstock_core.protocol.jobs import JobResult, JobState, Timings, Usage
from penstock_core.protocol.records import quick
from penstock_core.protocol.requests import MAX_SEED, GenerationRequest, SamplingParams
from penstock_worker.engine import Engine
from penstock_worker.held import HeldJob
from penstock_worker.outbox import Bury, Ending, Fail, Finish
from penstock_worker.resume import LoggedChoice, UnresumableLog, read_log

INLINE_BYTES = 16_384
"""Requests up to this size are prepared on the event loop; tokenizing a longer one would hold up the heartbeat."""


@quick
@dataclass(frozen=True, slots=True)
class Run:
    """The job is to run: what the engine is asked."""

    request: EngineRequest
    resumed_tokens: int


def admit(job: HeldJob, engine: Engine, *, served_name: str, worker_id: str) -> Run | Ending:
    """Decide what becomes of `job`."""
    try:
        request = decode_request(job.claimed.request)
    except UndecodableRecord as error:
        return Bury("undecodable", f"the stored request cannot be read: {error}")
    except InvalidRequest as error:
        return _refused(error)
    if request.model is not None and request.model != served_name:
        return Fail(
            "wrong_model",
            f"model: the request asks for {request.model!r}, but this queue's workers serve {served_name!r}; "
            "submit it to that model's queue, or leave model out",
            retryable=False,
        )
    try:
        choices = read_log(job.claimed.log)
    except UnresumableLog as error:
        return Fail("unresumable", f"the job was interrupted and cannot go on: {error}", retryable=False)
    try:
        prompt = engine.encode(request)
        job.prompt_tokens = len(prompt)
        if _complete(choices, request):
            return _finish(job, choices, served_name=served_name, worker_id=worker_id)
        wanted = _engine_request(job, request, prompt, choices)
        engine.validate(wanted)
    except InvalidRequest as error:
        return _refused(error)
    return Run(wanted, sum(len(choice.token_ids) for choice in choices))


def with_seed(sampling: SamplingParams, job_id: str) -> SamplingParams:
    """The options, with a seed that every attempt of the job derives alike where the request brought none."""
    if sampling.seed is not None:
        return sampling
    seed = int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8], "big") & MAX_SEED
    return sampling.model_copy(update={"seed": seed})


def _refused(error: InvalidRequest) -> Fail:
    return Fail("invalid_request", str(error), retryable=False)


def _complete(choices: list[LoggedChoice], request: GenerationRequest) -> bool:
    """Whether the log leaves nothing to compute."""
    sampling = request.sampling
    ended = all(choice.finish_reason is not None for choice in choices)
    return ended and len(choices) == sampling.n and sampling.prompt_logprobs is None


def _finish(job: HeldJob, choices: list[LoggedChoice], *, served_name: str, worker_id: str) -> Finish:
    """The last attempt published every token and died before it could say so."""
    usage = Usage(job.prompt_tokens, sum(len(choice.token_ids) for choice in choices))
    finished = tuple(choice.finished() for choice in choices)
    timings = Timings(queue_ms=job.queue_ms)
    return Finish(JobState.COMPLETED, JobResult(finished, usage, timings, None, worker_id, served_name))


def _engine_request(
    job: HeldJob, request: GenerationRequest, prompt: list[int], choices: list[LoggedChoice]
) -> EngineRequest:
    claimed = job.claimed
    deadline_s = None
    if claimed.deadline_ms is not None:
        deadline_s = job.claimed_at + (claimed.deadline_ms - claimed.claimed_ms) / 1000
    return EngineRequest(
        request_id=job.request_id,
        prompt_token_ids=prompt,
        sampling=with_seed(request.sampling, claimed.job_id),
        priority=claimed.priority,
        deadline_s=deadline_s,
        cache_salt=claimed.tenant,
        arrival_s=job.claimed_at,
        resume=tuple(choice.resumed() for choice in choices),
        prompt_text=request.prompt,
    )
