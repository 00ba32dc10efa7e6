"""From what a caller types to what travels: keywords in, one validated `NewJob` out. No I/O.

Every option of `SamplingParams` and `JobOptions` is a keyword of `submit`; this module sorts them, names a misspelt
one, assigns the seed that makes the job repeatable, and derives the cache-affinity tag.
"""

from __future__ import annotations

import difflib
import os
import random
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import pack
from typing import Any, Literal, TypedDict

from pydantic import ValidationError

from penstock.settings import ClientSettings
from penstock_core.protocol.codec import encode_request
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import (
    ChatMessage,
    GenerationRequest,
    JobOptions,
    ResponseFormat,
    SamplingParams,
    invalid_request,
)
from penstock_core.protocol.transitions import NewJob

# A prompt shorter than this shares too few pages to be worth waiting for a particular worker; and what two prompts
# have in common beyond the longer bound says little about which worker has the pages.
_AFFINITY_MIN_CHARS = 64
_AFFINITY_MAX_CHARS = 512
_CHARS_PER_TOKEN = 4


class SubmitOptions(TypedDict, total=False):
    """Keywords of `submit`, and keys of an item of `submit_many`.

    The prompt in one of its forms; the sampling options, as `sampling` or one by one (the single ones win); and the
    delivery options. `SamplingParams` and `JobOptions` document each.
    """

    messages: Sequence[ChatMessage | Mapping[str, str]]
    prompt_token_ids: Sequence[int]
    request: GenerationRequest
    model: str | None

    sampling: SamplingParams | Mapping[str, Any]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    n: int
    best_of: int | None
    max_tokens: int | None
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str]
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    response_format: ResponseFormat | Mapping[str, Any] | None
    skip_special_tokens: bool

    priority: int
    tenant: str
    deadline_s: float | None
    delay_s: float | None
    not_before: float | None
    max_retries: int
    idempotency_key: str | None
    result_ttl_s: float
    affinity: str | None
    metadata: Mapping[str, str] | None
    traceparent: str | None
    durability: Literal["memory", "fsync"]


class JobItem(SubmitOptions, total=False):
    """An item of `submit_many`: the keywords of `submit`, with the prompt among them."""

    prompt: str


_SAMPLING_FIELDS = frozenset(SamplingParams.model_fields)
_DELIVERY_FIELDS = frozenset(JobOptions.model_fields)
_REQUEST_FIELDS = frozenset({"prompt", "messages", "prompt_token_ids", "request", "sampling", "model"})
KNOWN_OPTIONS = _SAMPLING_FIELDS | _DELIVERY_FIELDS | _REQUEST_FIELDS


def prepare(settings: ClientSettings, given: Mapping[str, Any], *, at: str = "") -> NewJob:
    """Validate one job and encode it.

    Args:
        settings: gives tenant and model where the job does not.
        given: the keywords, see `JobItem`. A prompt of None counts as not given.
        at: what to put before a field's name in an error, such as `jobs[3].`.

    Raises:
        InvalidRequest: names the field, the value, the limit, and for an unknown option the nearest known one.
    """
    sampling_values: dict[str, Any] = {}
    delivery_values: dict[str, Any] = {"tenant": settings.tenant}
    request_values: dict[str, Any] = {}
    for name, value in given.items():
        if name in _SAMPLING_FIELDS:
            sampling_values[name] = value
        elif name in _DELIVERY_FIELDS:
            delivery_values[name] = value
        elif name in _REQUEST_FIELDS:
            if value is not None:
                request_values[name] = value
        else:
            raise InvalidRequest(f"{at}{name}", f"unknown option{_hint(name)}")
    try:
        tenant = delivery_values["tenant"]
        plain = len(delivery_values) == 1 and type(tenant) is str
        options = _plain_options(tenant) if plain else JobOptions.model_validate(delivery_values)
        request = _request(settings, request_values, sampling_values, at)
    except ValidationError as error:
        raise invalid_request(error, at) from None
    return _new_job(request, options)


def prepare_many(settings: ClientSettings, items: Sequence[str | Mapping[str, Any]]) -> list[NewJob]:
    """Validate and encode all items, or raise `InvalidRequest` naming the index of the first bad one."""
    jobs = []
    for index, item in enumerate(items):
        if isinstance(item, str):
            item = {"prompt": item}
        elif not isinstance(item, Mapping):
            raise InvalidRequest(
                f"jobs[{index}]", f"expected a prompt or a mapping of submit's keywords, got {type(item).__name__}"
            )
        jobs.append(prepare(settings, item, at=f"jobs[{index}]."))
    return jobs


@lru_cache(maxsize=256)
def _plain_options(tenant: str) -> JobOptions:
    """The options of a job that has none of its own."""
    return JobOptions.model_validate({"tenant": tenant})


def _new_job(request: GenerationRequest, options: JobOptions) -> NewJob:
    return NewJob(
        job_id=new_job_id(),
        request=encode_request(request),
        options=options,
        input_tokens=request.estimated_prompt_tokens(),
        output_tokens=request.estimated_output_tokens(),
        affinity=affinity_tag(options.tenant, request) if options.affinity is None else options.affinity,
    )


def new_job_id() -> str:
    """32 hex digits: microseconds since 1970, then 72 random bits, so that ids sort by submission."""
    return f"{time.time_ns() // 1000:014x}{os.urandom(9).hex()}"


def affinity_tag(tenant: str, request: GenerationRequest) -> str:
    """Tag that requests sharing the beginning of their prompt have in common; empty where nothing is gained.

    Of a conversation only the first message counts, so that all its turns go to one worker. The tenant is part of the
    tag, because prefix caches are not shared between tenants.
    """
    if request.prompt is not None:
        beginning = request.prompt[:_AFFINITY_MAX_CHARS].encode()
        length = len(beginning)
    elif request.messages is not None:
        beginning = request.messages[0].content[:_AFFINITY_MAX_CHARS].encode()
        length = len(beginning)
    else:
        ids = (request.prompt_token_ids or ())[: _AFFINITY_MAX_CHARS // _CHARS_PER_TOKEN]
        length = len(ids) * _CHARS_PER_TOKEN
        beginning = pack(f"<{len(ids)}I", *ids)
    if length < _AFFINITY_MIN_CHARS:
        return ""
    return blake2b(beginning, digest_size=8, key=tenant.encode()).hexdigest()


def _request(settings: ClientSettings, values: dict[str, Any], overrides: dict[str, Any], at: str) -> GenerationRequest:
    base = values.pop("request", None)
    if base is not None:
        if not isinstance(base, GenerationRequest):
            raise InvalidRequest(f"{at}request", f"expected a GenerationRequest, got {type(base).__name__}")
        if values:
            raise InvalidRequest(f"{at}{min(values)}", "given together with request, which has it already; give one")
        if not overrides and base.sampling.seed is not None:
            return base
        values = {name: getattr(base, name) for name in base.model_fields_set}
    if settings.model is not None:
        values.setdefault("model", settings.model)
    values["sampling"] = _sampling(values.get("sampling"), overrides, at)
    return GenerationRequest.model_validate(values)


def _sampling(base: Any, overrides: dict[str, Any], at: str) -> SamplingParams:
    if isinstance(base, SamplingParams):
        overrides = {name: getattr(base, name) for name in base.model_fields_set} | overrides
    elif isinstance(base, Mapping):
        overrides = {**base, **overrides}
    elif base is not None:
        raise InvalidRequest(f"{at}sampling", f"expected SamplingParams or a mapping, got {type(base).__name__}")
    if isinstance(overrides.get("stop"), str):
        overrides["stop"] = (overrides["stop"],)
    if overrides.get("seed") is None:
        # Without a seed a resumed attempt could not go on with the same noise, and nobody could repeat the job.
        overrides["seed"] = random.getrandbits(63)
    try:
        return SamplingParams.model_validate(overrides)
    except ValidationError as error:
        raise invalid_request(error, f"{at}sampling.") from None


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, KNOWN_OPTIONS, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; see SubmitOptions for those there are"
