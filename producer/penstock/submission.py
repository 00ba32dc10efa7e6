"""From what a caller types to what travels: keywords in, one validated `NewJob` out. No I/O.

Every option of `SamplingParams` and `JobOptions` is a keyword of `submit`; this module sorts them, names a misspelt
one, assigns the seed that makes the job repeatable, and derives the cache-affinity tag.
"""

from __future__ import annotations

import difflib
import os
import random
import sys
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, TypedDict

from pydantic import ValidationError

from penstock.settings import ClientSettings
from penstock_core.protocol.codec import encode_request, encode_request_fields, plain_sampling
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import (
    MAX_PROMPT_CHARS,
    MAX_PROMPT_TOKENS,
    MAX_SEED,
    ChatMessage,
    GenerationRequest,
    JobOptions,
    ResponseFormat,
    SamplingParams,
    invalid_request,
    pack_ids,
)
from penstock_core.protocol.transitions import NewJob

# A prompt shorter than this shares too few pages to be worth waiting for a particular worker; and what two prompts
# have in common beyond the longer bound says little about which worker has the pages.
_AFFINITY_MIN_CHARS = 64
_AFFINITY_MAX_CHARS = 512
_CHARS_PER_TOKEN = 4
_AFFINITY_MAX_IDS = _AFFINITY_MAX_CHARS // _CHARS_PER_TOKEN


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


def prepare(settings: ClientSettings, given: Mapping[str, Any], *, at: str = "", job_id: str | None = None) -> NewJob:
    """Validate one job and encode it.

    Args:
        settings: gives tenant and model where the job does not.
        given: the keywords, see `JobItem`. A prompt of None counts as not given.
        at: what to put before a field's name in an error, such as `jobs[3].`.
        job_id: None makes one.

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
        work = _plain_work(settings, request_values, sampling_values)
        if work is None:
            work = _work_of(_request(settings, request_values, sampling_values, at))
    except ValidationError as error:
        raise invalid_request(error, at) from None
    return NewJob(
        job_id=job_id if job_id is not None else new_job_id(),
        request=work.request,
        options=options,
        input_tokens=work.input_tokens,
        output_tokens=work.output_tokens,
        affinity=_affinity_tag(options.tenant, work.beginning) if options.affinity is None else options.affinity,
    )


def prepare_many(settings: ClientSettings, items: Sequence[str | Mapping[str, Any]]) -> list[NewJob]:
    """Validate and encode all items, or raise `InvalidRequest` naming the index of the first bad one."""
    jobs = []
    for (index, item), job_id in zip(enumerate(items), new_job_ids(len(items)), strict=True):
        if isinstance(item, str):
            item = {"prompt": item}
        elif not isinstance(item, Mapping):
            raise InvalidRequest(
                f"jobs[{index}]", f"expected a prompt or a mapping of submit's keywords, got {type(item).__name__}"
            )
        jobs.append(prepare(settings, item, at=f"jobs[{index}].", job_id=job_id))
    return jobs


@lru_cache(maxsize=256)
def _plain_options(tenant: str) -> JobOptions:
    """The options of a job that has none of its own."""
    return JobOptions.model_validate({"tenant": tenant})


def new_job_id() -> str:
    """See `new_job_ids`."""
    return next(new_job_ids(1))


def new_job_ids(count: int) -> Iterator[str]:
    """Each 32 hex digits: microseconds since 1970, then 72 random bits, so that ids sort by submission."""
    now, random_bits = time.time_ns() // 1000, os.urandom(9 * count).hex()
    return (f"{now:014x}{random_bits[i : i + 18]}" for i in range(0, 18 * count, 18))


@dataclass(slots=True)
class _Work:
    """What is to be generated: the encoded request, estimates in tokens, and the prompt's beginning.

    `beginning` is empty where a prompt is too short for an affinity to gain anything.
    """

    request: bytes
    input_tokens: int
    output_tokens: int
    beginning: bytes


_SCALARS = frozenset({int, float, bool, str, type(None)})


def _plain_work(settings: ClientSettings, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> _Work | None:
    """The work of an ordinary job: one prompt in text or ids, single-valued sampling options. None for any other, and
    for whatever may be wrong: `_request` knows how to say it.

    Same bytes, a third of the time: options that were seen before are not validated again, and no model is made.
    """
    options = dict(overrides)
    seed = options.pop("seed", None)
    if len(values) != 1 or not _SCALARS.issuperset(map(type, options.values())):
        return None
    if seed is None:
        seed = random.getrandbits(63)
    elif type(seed) is not int or not 0 <= seed <= MAX_SEED:
        return None
    fields: dict[str, Any] = dict(values)
    ids, prompt = values.get("prompt_token_ids"), values.get("prompt")
    try:
        if type(ids) is list and 0 < len(ids) <= MAX_PROMPT_TOKENS:
            packed = pack_ids(ids)
            if packed is None:
                return None
            input_tokens, beginning = len(ids), _beginning_of_ids(packed[:_AFFINITY_MAX_IDS])
        elif type(prompt) is str and 0 < len(prompt) <= MAX_PROMPT_CHARS:
            text = prompt.encode()
            input_tokens, beginning = len(text) // 4 + 1, _beginning_of_text(prompt)
        else:
            return None
        sampling, output_tokens = _known_sampling(tuple(options.items()), tuple(map(type, options.values())))
        if settings.model is not None:
            fields["model"] = settings.model
        fields["sampling"] = {**sampling, "seed": seed}
        return _Work(encode_request_fields(fields), input_tokens, output_tokens, beginning)
    except (TypeError, ValueError, OverflowError, InvalidRequest):  # pydantic's error is a ValueError
        return None


@lru_cache(maxsize=1024)
def _known_sampling(options: tuple[tuple[str, Any], ...], types: tuple[type, ...]) -> tuple[Mapping[str, Any], int]:
    """Single-valued options, validated: their encoded form, and the output estimate. `types` tells 1 from True."""
    sampling = _sampling(None, dict(options), "")
    fields = plain_sampling(sampling)
    del fields["seed"]  # every job has its own
    return fields, sampling.estimated_output_tokens()


def _work_of(request: GenerationRequest) -> _Work:
    if request.prompt is not None:
        beginning = _beginning_of_text(request.prompt)
    elif request.messages is not None:  # the first alone, so that all turns of a conversation go to one worker
        beginning = _beginning_of_text(request.messages[0].content)
    else:
        beginning = _beginning_of_ids(array("i", (request.prompt_token_ids or ())[:_AFFINITY_MAX_IDS]))
    return _Work(
        encode_request(request), request.estimated_prompt_tokens(), request.estimated_output_tokens(), beginning
    )


def _beginning_of_text(text: str) -> bytes:
    beginning = text[:_AFFINITY_MAX_CHARS].encode()
    return beginning if len(beginning) >= _AFFINITY_MIN_CHARS else b""


def _beginning_of_ids(ids: array[int]) -> bytes:
    """`ids` are the first, as many as count."""
    if len(ids) * _CHARS_PER_TOKEN < _AFFINITY_MIN_CHARS:
        return b""
    if sys.byteorder != "little":
        ids.byteswap()  # the tag must not depend on the machine
    return ids.tobytes()


def _affinity_tag(tenant: str, beginning: bytes) -> str:
    """Tag that requests sharing the beginning of their prompt have in common; empty where nothing is gained.

    The tenant is part of the tag, because prefix caches are not shared between tenants.
    """
    return blake2b(beginning, digest_size=8, key=tenant.encode()).hexdigest() if beginning else ""


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
