"""Records as bytes: msgpack arrays that begin with the protocol version, bounded in size when written and when read.

A reader understands the current version and the one before, ignores elements appended by a later writer of the same
version, and raises `UndecodableRecord` with the reason for anything else. Events are the hot path: plain tuples in and
out, no validation library. Requests are validated again on reading, because a worker must survive any bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from penstock_core.protocol.errors import InvalidRequest, RecordTooLarge, UndecodableRecord
from penstock_core.protocol.events import Event, JobEnded, TokenChunk
from penstock_core.protocol.jobs import (
    Choice,
    FinishReason,
    JobFailure,
    JobResult,
    JobState,
    Speculation,
    Timings,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from penstock_core.protocol.requests import ChatMessage, GenerationRequest, ResponseFormat, SamplingParams

VERSION = 1
OLDEST_READABLE = max(1, VERSION - 1)
MAX_REQUEST_BYTES = 8 * 1024 * 1024
MAX_CHUNK_BYTES = 4 * 1024 * 1024
MAX_EVENT_BYTES = 64 * 1024 * 1024
MAX_METADATA_BYTES = 64 * 1024
MAX_FRAME_BYTES = 256 * 1024 * 1024
_MAX_ELEMENTS = 4 * 1024 * 1024
_MAX_DRAFTS = 64  # of a sequence and step

_CHUNK, _ENDED = 0, 1
_TEXT, _INTEGER = frozenset({str}), frozenset({int})
_STATES = {state.value: state for state in JobState}  # a call of the enum costs three times as much
_REASONS = {reason.value: reason for reason in FinishReason}
_pack: Callable[[Any], bytes] = msgpack.packb


def _unpack(data: bytes, limit: int, what: str, *, lists: bool = False) -> Any:
    """msgpack to plain values under every bound msgpack offers; raises `UndecodableRecord`."""
    if len(data) > limit:
        raise UndecodableRecord(f"{what}: {len(data)} bytes, limit {limit}")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=lists,
            strict_map_key=True,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=_MAX_ELEMENTS,
            max_map_len=65_536,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise UndecodableRecord(f"{what}: not msgpack this protocol writes: {reason}") from None


def _versioned(data: bytes, limit: int, what: str, *, lists: bool = False) -> Sequence[Any]:
    """The record's elements, version first, once the version is known to be readable."""
    record = _unpack(data, limit, what, lists=lists)
    if not isinstance(record, tuple | list) or not record or type(record[0]) is not int:
        raise UndecodableRecord(f"{what}: a record is an array that begins with its version, got {_shown(record)}")
    if not OLDEST_READABLE <= record[0] <= VERSION:
        raise UndecodableRecord(
            f"{what}: protocol version {record[0]}, this side reads {OLDEST_READABLE} to {VERSION}; "
            "upgrade the older side"
        )
    return record


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- events -----------------------------------------------------------------------------------------------------------


def encode_event(event: Event) -> bytes:
    """Bytes of a chunk or terminal event; raises `RecordTooLarge`."""
    if type(event) is TokenChunk:
        record: tuple[Any, ...] = (
            VERSION,
            _CHUNK,
            event.attempt,
            event.index,
            event.offset,
            event.token_ids,
            event.pieces,
            event.finish_reason,
        )
        if event.logprobs is not None:
            record += (_plain_logprobs(event.logprobs),)
        data, limit = _pack(record), MAX_CHUNK_BYTES
    else:
        assert isinstance(event, JobEnded)
        data, limit = _pack((VERSION, _ENDED, event.state, event.attempt, *_plain_end(event))), MAX_EVENT_BYTES
    if len(data) > limit:
        raise RecordTooLarge(f"{type(event).__name__}: {len(data)} bytes encoded, limit {limit}")
    return data


def decode_event(data: bytes) -> Event:
    """The event in `data`; raises `UndecodableRecord`."""
    record = _versioned(data, MAX_EVENT_BYTES, "event")
    try:
        if record[1] == _CHUNK:
            _, _, attempt, index, offset, token_ids, pieces, finish_reason, *rest = record
            return TokenChunk(
                _count(attempt, "attempt"),
                _count(index, "index"),
                _count(offset, "offset"),
                _token_ids(token_ids),
                _strings(pieces),
                _reason(finish_reason) if finish_reason is not None else None,
                _read_logprobs(rest[0]) if rest else None,
            )
        if record[1] == _ENDED:
            _, _, state, attempt, result, failure, *_ = record
            return JobEnded(
                _STATES.get(state) or JobState(state),
                _count(attempt, "attempt"),
                _read_result(result) if result is not None else None,
                JobFailure(*_strings(failure[:2])) if failure is not None else None,
            )
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UndecodableRecord(f"event: {error}") from None
    raise UndecodableRecord(f"event: unknown kind {_shown(record[1])}")


def is_terminal_event(data: bytes) -> bool:
    """Whether encoded event `data` is a `JobEnded`, by its third byte: after the array's header and the version."""
    return data[2:3] == b"\x01"


def ended_template(state: JobState, code: str, message: str) -> tuple[bytes, bytes]:
    """A result-less `JobEnded` in two halves; between them goes the attempt, which only the script knows."""
    head = b"\x96" + _pack(VERSION) + _pack(_ENDED) + _pack(state)
    return head, _pack(None) + _pack((code, message))


def ended_opening(state: JobState, code: str) -> tuple[bytes, bytes]:
    """As `ended_template`, for a message that only the script knows: packed as a string, it ends the record."""
    head, _ = ended_template(state, code, "")
    return head, _pack(None) + b"\x92" + _pack(code)


def decode_frame(data: bytes) -> list[tuple[str, bytes]]:
    """The (job id, event bytes) pairs of one push on a client's channel; raises `UndecodableRecord`."""
    pairs = _unpack(data, MAX_FRAME_BYTES, "client frame")
    try:
        return [(str(job_id), bytes(event)) for job_id, event in pairs]
    except (TypeError, ValueError) as error:
        raise UndecodableRecord(f"client frame: {error}") from None


def _plain_logprobs(logprobs: Sequence[TokenLogprob | None]) -> list[tuple[Any, ...] | None]:
    return [
        None if lp is None else (lp.logprob, lp.top, lp.spelled) if lp.spelled else (lp.logprob, lp.top)
        for lp in logprobs
    ]


def _read_logprob(value: Any) -> TokenLogprob:
    logprob, top, *more = value
    spelled = tuple(more[0]) if more else ()
    if spelled and (len(spelled) != 1 + len(top) or not all(isinstance(token, bytes) for token in spelled)):
        raise ValueError(f"{len(top)} tokens come with {len(spelled)} spellings")
    return TokenLogprob(float(logprob), tuple((int(token_id), float(lp)) for token_id, lp in top), spelled)


def _read_logprobs(values: Any) -> tuple[TokenLogprob, ...]:
    return tuple(_read_logprob(value) for value in values)


def _plain_end(event: JobEnded) -> tuple[Any, Any]:
    failure = (event.failure.code, event.failure.message) if event.failure is not None else None
    return (_plain_result(event.result) if event.result is not None else None), failure


def _plain_result(result: JobResult) -> tuple[Any, ...]:
    usage, timings, speculation = result.usage, result.timings, result.speculation
    plain = (
        [
            (
                choice.index,
                choice.text,
                choice.token_ids,
                choice.finish_reason,
                _plain_logprobs(choice.logprobs) if choice.logprobs is not None else None,
            )
            for choice in result.choices
        ],
        (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        (
            timings.queue_ms,
            timings.prefill_ms,
            timings.ttft_ms,
            timings.decode_ms,
            timings.preemptions,
            timings.drafted_tokens,
            timings.accepted_tokens,
        ),
        _plain_logprobs(result.prompt_logprobs) if result.prompt_logprobs is not None else None,
        result.worker,
        result.model,
    )
    if speculation is None:
        return plain
    return *plain, (speculation.drafted_at, speculation.accepted_at, speculation.depths, speculation.saved_ms)


def _read_result(value: Any) -> JobResult:
    choices, usage, timings, prompt_logprobs, worker, model, *more = value
    prompt_tokens, completion_tokens, cached_tokens, *_ = usage
    return JobResult(
        tuple([_read_choice(choice) for choice in choices]),
        Usage(_count(prompt_tokens, "usage"), _count(completion_tokens, "usage"), _count(cached_tokens, "usage")),
        _read_timings(timings),
        (
            tuple([_read_logprob(lp) if lp is not None else None for lp in prompt_logprobs])
            if prompt_logprobs is not None
            else None
        ),
        _string(worker),
        _string(model),
        _read_speculation(more[0]) if more and more[0] is not None else None,
    )


def _read_speculation(value: Any) -> Speculation:
    *counts, saved_ms = value[:4]
    if len(counts) != 3 or any(len(numbers) > _MAX_DRAFTS + 1 for numbers in counts):
        raise ValueError(f"speculation: three lists of at most {_MAX_DRAFTS + 1} counts are expected")
    drafted_at, accepted_at, depths = (
        tuple([_count(number, "speculation") for number in numbers]) for numbers in counts
    )
    return Speculation(drafted_at, accepted_at, depths, float(saved_ms))


def _read_timings(value: Any) -> Timings:
    queue_ms, prefill_ms, ttft_ms, decode_ms, preemptions, drafted, accepted, *_ = value
    return Timings(
        float(queue_ms),
        float(prefill_ms),
        float(ttft_ms),
        float(decode_ms),
        _count(preemptions, "preemptions"),
        _count(drafted, "drafted_tokens"),
        _count(accepted, "accepted_tokens"),
    )


def _read_choice(value: Any) -> Choice:
    index, text, token_ids, finish_reason, logprobs, *_ = value
    return Choice(
        _count(index, "index"),
        _string(text),
        _token_ids(token_ids),
        _reason(finish_reason),
        _read_logprobs(logprobs) if logprobs is not None else None,
    )


def _reason(value: Any) -> FinishReason:
    return _REASONS.get(value) or FinishReason(value)


def _count(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name}: a count is expected, got {_shown(value)}")
    return value


def _string(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"text is expected, got {_shown(value)}")
    return value


def _strings(values: Any) -> tuple[str, ...]:
    if type(values) is not tuple or not _TEXT.issuperset(map(type, values)):
        raise ValueError(f"strings are expected, got {_shown(values)}")
    return values


def _token_ids(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or not _INTEGER.issuperset(map(type, values)):
        raise ValueError(f"token ids are expected, got {_shown(values)}")
    return values


# --- requests ---------------------------------------------------------------------------------------------------------


def encode_request(request: GenerationRequest) -> bytes:
    """Bytes of a request: `[version, {field: value}]` with the fields that were set.

    Defaults are not written: they are part of the protocol version. Raises `InvalidRequest` if it is too long.
    """
    fields: dict[str, Any] = {name: getattr(request, name) for name in request.model_fields_set}
    messages: tuple[ChatMessage, ...] | None = fields.get("messages")
    if messages is not None:
        fields["messages"] = [(message.role, message.content) for message in messages]
    sampling: SamplingParams | None = fields.get("sampling")
    if sampling is not None:
        fields["sampling"] = plain_sampling(sampling)
    return encode_request_fields(fields)


def encode_request_fields(fields: Mapping[str, Any]) -> bytes:
    """Bytes of a request whose fields, known to be valid, are plain values already. Raises as `encode_request`."""
    try:
        data = _pack((VERSION, fields))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidRequest("request", f"cannot be encoded: {error}") from None
    if len(data) > MAX_REQUEST_BYTES:
        raise InvalidRequest(
            "request", f"{len(data)} bytes encoded, limit {MAX_REQUEST_BYTES}; shorten the prompt or the messages"
        )
    return data


def plain_sampling(sampling: SamplingParams) -> dict[str, Any]:
    """The options that were set, as a request record has them."""
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in sampling.model_fields_set}
    if fields.get("logit_bias"):
        fields["logit_bias"] = list(fields["logit_bias"].items())  # map keys are strings in every record
    response_format: ResponseFormat | None = fields.get("response_format")
    if response_format is not None:
        fields["response_format"] = {name: getattr(response_format, name) for name in response_format.model_fields_set}
    return fields


def decode_request(data: bytes) -> GenerationRequest:
    """The request in `data`, validated.

    Raises `UndecodableRecord` for bytes that are no request, `InvalidRequest` for a request with a wrong field.
    """
    # With it comes pydantic, which a client's import can do without.
    from penstock_core.protocol.requests import GenerationRequest

    record = _versioned(data, MAX_REQUEST_BYTES, "request", lists=True)  # lists: a JSON schema has no tuples
    if len(record) < 2 or not isinstance(record[1], dict):
        raise UndecodableRecord("request: a map of fields is expected after the version")
    fields: dict[str, Any] = record[1]
    try:
        if fields.get("messages") is not None:
            fields["messages"] = [{"role": role, "content": content} for role, content in fields["messages"]]
        sampling = fields.get("sampling")
        if sampling is not None and sampling.get("logit_bias"):
            sampling["logit_bias"] = dict(sampling["logit_bias"])
    except (TypeError, ValueError, AttributeError) as error:
        raise UndecodableRecord(f"request: {error}") from None
    return GenerationRequest.parse(fields)


# --- metadata and other maps of named values --------------------------------------------------------------------------


def encode_metadata(metadata: Mapping[str, str] | None) -> bytes:
    """Bytes of a job's metadata, empty for none; raises `InvalidRequest` if too long."""
    if not metadata:
        return b""
    data = _pack((VERSION, dict(metadata)))
    if len(data) > MAX_METADATA_BYTES:
        raise InvalidRequest("metadata", f"{len(data)} bytes encoded, limit {MAX_METADATA_BYTES}; store it elsewhere")
    return data


def decode_metadata(data: bytes) -> dict[str, str]:
    """A job's metadata; raises `UndecodableRecord`."""
    return dict(decode_fields(data, MAX_METADATA_BYTES, "metadata")) if data else {}


def encode_fields(fields: Mapping[str, Any]) -> bytes:
    """Bytes of named values, `[version, {name: value}]`."""
    return _pack((VERSION, dict(fields)))


def decode_fields(data: bytes, limit: int, what: str) -> dict[str, Any]:
    """Named values; raises `UndecodableRecord`."""
    record = _versioned(data, limit, what)
    if len(record) < 2 or not isinstance(record[1], dict):
        raise UndecodableRecord(f"{what}: a map of fields is expected after the version")
    return record[1]
