"""Bytes in, the same record out; anything else is refused with the reason, within bounds, never with a crash."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_core.protocol import codec
from penstock_core.protocol.errors import InvalidRequest, RecordTooLarge, UndecodableRecord
from penstock_core.protocol.events import JobEnded, TokenChunk
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
from penstock_core.protocol.requests import ChatMessage, GenerationRequest, ResponseFormat, SamplingParams
from penstock_core.protocol.workers import WorkerRecord

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
tops = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-100, 0)), max_size=3).map(tuple)


@st.composite
def _logprobs(draw: st.DrawFn) -> TokenLogprob:
    """With the tokens' spellings, or from a worker that knew none."""
    top = draw(tops)
    spelled = draw(st.just(()) | st.tuples(*[st.binary(max_size=4)] * (1 + len(top))))
    return TokenLogprob(draw(st.floats(-100, 0)), top, spelled)


logprob = _logprobs()
texts = st.text(max_size=20)
counts = st.integers(0, 2**40)
chunks = st.builds(
    TokenChunk,
    attempt=counts,
    index=st.integers(0, 63),
    offset=counts,
    token_ids=token_ids,
    pieces=st.lists(texts, max_size=5).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    logprobs=st.none() | st.lists(logprob, max_size=3).map(tuple),
)
choices = st.builds(
    Choice,
    index=st.integers(0, 63),
    text=texts,
    token_ids=token_ids,
    finish_reason=st.sampled_from(FinishReason),
    logprobs=st.none() | st.lists(logprob, max_size=3).map(tuple),
)
milliseconds = st.floats(0, 1e9)
results = st.builds(
    JobResult,
    choices=st.lists(choices, max_size=3).map(tuple),
    usage=st.builds(Usage, counts, counts, counts),
    timings=st.builds(Timings, milliseconds, milliseconds, milliseconds, milliseconds, counts, counts, counts),
    prompt_logprobs=st.none() | st.lists(st.none() | logprob, max_size=3).map(tuple),
    worker=texts,
    model=texts,
    speculation=st.none()
    | st.builds(
        Speculation,
        st.lists(counts, max_size=64).map(tuple),
        st.lists(counts, max_size=64).map(tuple),
        st.lists(counts, max_size=65).map(tuple),
        st.floats(-1e9, 1e9),
    ),
)
ends = st.builds(
    JobEnded,
    state=st.sampled_from(JobState),
    attempt=counts,
    result=st.none() | results,
    failure=st.none() | st.builds(JobFailure, texts, texts),
)


@given(chunks | ends)
def test_events_survive_the_journey(event: TokenChunk | JobEnded) -> None:
    data = codec.encode_event(event)
    assert codec.decode_event(data) == event
    assert codec.is_terminal_event(data) == isinstance(event, JobEnded)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_refused(data: bytes) -> None:
    try:
        event = codec.decode_event(data)
    except UndecodableRecord:
        return
    assert isinstance(event, TokenChunk | JobEnded)


@given(chunks | ends, st.integers(0, 300), st.binary(min_size=1, max_size=3))
def test_a_damaged_event_is_an_event_or_refused(event, at: int, damage: bytes) -> None:
    data = codec.encode_event(event)
    at = at % len(data)
    with contextlib.suppress(UndecodableRecord):
        codec.decode_event(data[:at] + damage + data[at + len(damage) :])


REQUESTS = [
    GenerationRequest(prompt="Once upon a time"),
    GenerationRequest(prompt_token_ids=(1, 2, 3), model="m"),
    GenerationRequest(
        messages=(ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hé \U0001f600"))
    ),
    GenerationRequest(
        prompt="x",
        sampling=SamplingParams(
            temperature=0.5, seed=2**63 - 1, n=2, best_of=3, max_tokens=None, stop=("a", "b"), bad_words=("no",),
            logit_bias={5: -1.5, 7: 2.0}, allowed_token_ids=(1, 2), logprobs=3,
            response_format=ResponseFormat(choice=("yes", "no")),
        ),
    ),
    GenerationRequest(
        prompt="x",
        sampling=SamplingParams(
            response_format=ResponseFormat(json_schema={"type": "object", "properties": {"a": {"enum": [1, None]}}})
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_requests_survive_the_journey(request_: GenerationRequest) -> None:
    assert codec.decode_request(codec.encode_request(request_)) == request_


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    with contextlib.suppress(UndecodableRecord, InvalidRequest):
        assert isinstance(codec.decode_request(data), GenerationRequest)


def pack(*record: object) -> bytes:
    return msgpack.packb(record)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"not msgpack at all", "not msgpack"),
        (pack(1, {"prompt": "x"})[:-1], "not msgpack"),
        (pack(1, {"prompt": "x"}) + b"\x00", "not msgpack"),
        (msgpack.packb({"version": 1}), "begins with its version"),
        (pack("1", {}), "begins with its version"),
        (pack(True, {}), "begins with its version"),
        (pack(), "begins with its version"),
        (pack(2, {"prompt": "x"}), "protocol version 2, this side reads 1 to 1"),
        (pack(0, {"prompt": "x"}), "protocol version 0"),
        (pack(1), "a map of fields"),
        (pack(1, [1]), "a map of fields"),
        (pack(1, {"prompt": "x", "colour": "red"}), "colour: unknown option"),
        (pack(1, {}), "exactly one of prompt"),
        (pack(1, {"prompt": "x", "sampling": {"temperature": float("nan")}}), "sampling.temperature"),
        (pack(1, {"prompt": "x", "sampling": 3}), "request"),
        (pack(1, {"prompt": "x", "sampling": {"logit_bias": 3}}), "request"),
        (pack(1, {"messages": "hello"}), "request"),
        (pack(1, {"prompt": b"\xff"}), "prompt"),
        (msgpack.packb((1, {3: "x"}), strict_types=False), "request"),
        (msgpack.packb((1, msgpack.ExtType(1, b"x"))), "not msgpack"),
        (b"\x91" * 2000, "request"),
    ],
)
def test_an_undecodable_request_names_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises((UndecodableRecord, InvalidRequest), match=reason):
        codec.decode_request(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pack(1, 7), "unknown kind 7"),
        (pack(1), "event"),
        (pack(1, 0, 1), "event"),
        (pack(1, 0, -1, 0, 0, (), (), None), "attempt"),
        (pack(1, 0, 1, 0, "0", (), (), None), "offset"),
        (pack(1, 0, 1, 0, 0, ("a",), ("a",), None), "token ids"),
        (pack(1, 0, 1, 0, 0, (1,), (2,), None), "strings"),
        (pack(1, 0, 1, 0, 0, (), (), "bored"), "bored"),
        (pack(1, 1, "sleeping", 1, None, None), "sleeping"),
        (pack(1, 1, "failed", 1, None, ("code",)), "event"),
        (pack(1, 1, "completed", 1, ("rubbish",), None), "event"),
    ],
)
def test_an_undecodable_event_names_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableRecord, match=reason):
        codec.decode_event(data)


class TestVersions:
    """A reader understands its own version and the one before, and elements appended by a later writer."""

    def test_records_of_the_version_before_are_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chunk, request = TokenChunk(1, 0, 0, (5,), ("a",)), REQUESTS[0]
        written = codec.encode_event(chunk), codec.encode_request(request)
        monkeypatch.setattr(codec, "VERSION", 2)
        monkeypatch.setattr(codec, "OLDEST_READABLE", 1)
        assert codec.decode_event(written[0]) == chunk
        assert codec.decode_request(written[1]) == request
        assert codec.decode_event(codec.encode_event(chunk)) == chunk
        monkeypatch.setattr(codec, "VERSION", 3)
        monkeypatch.setattr(codec, "OLDEST_READABLE", 2)
        with pytest.raises(UndecodableRecord, match="protocol version 1, this side reads 2 to 3"):
            codec.decode_event(written[0])

    @pytest.mark.parametrize(
        "event",
        [TokenChunk(1, 0, 0, (5,), ("a",), FinishReason.STOP, (TokenLogprob(-1.0),)), JobEnded(JobState.COMPLETED, 1)],
    )
    def test_elements_appended_later_are_ignored(self, event) -> None:
        record = msgpack.unpackb(codec.encode_event(event), use_list=True)
        assert codec.decode_event(msgpack.packb([*record, {"new": 1}])) == event


def test_a_template_around_an_attempt_is_the_encoded_event() -> None:
    head, tail = codec.ended_template(JobState.EXPIRED, "deadline", "too late")
    for attempt, packed in ((0, b"\x00"), (127, b"\x7f"), (300, b"\xce\x00\x00\x01\x2c")):
        event = codec.decode_event(head + packed + tail)
        assert event == JobEnded(JobState.EXPIRED, attempt, None, JobFailure("deadline", "too late"))
        assert codec.is_terminal_event(head + packed + tail)


def test_a_request_over_the_limit_is_refused_by_the_writer_with_size_and_limit() -> None:
    messages = tuple(ChatMessage(role="user", content="x" * 4_000_000) for _ in range(3))
    with pytest.raises(InvalidRequest, match=r"12000\d+ bytes encoded, limit 8388608") as refusal:
        codec.encode_request(GenerationRequest(messages=messages))
    assert refusal.value.field == "request"


def test_a_schema_msgpack_cannot_hold_is_refused_by_the_writer() -> None:
    schema = {"maximum": 2**70}
    with pytest.raises(InvalidRequest, match="cannot be encoded"):
        codec.encode_request(
            GenerationRequest(prompt="x", sampling=SamplingParams(response_format=ResponseFormat(json_schema=schema)))
        )


def test_records_over_the_limit_are_refused_by_writer_and_reader() -> None:
    with pytest.raises(RecordTooLarge, match=f"limit {codec.MAX_CHUNK_BYTES}"):
        codec.encode_event(TokenChunk(1, 0, 0, (1,), ("x" * codec.MAX_CHUNK_BYTES,)))
    with pytest.raises(UndecodableRecord, match=f"{codec.MAX_REQUEST_BYTES + 1} bytes, limit"):
        codec.decode_request(b"\x00" * (codec.MAX_REQUEST_BYTES + 1))


def test_metadata_survives_and_is_bounded() -> None:
    assert codec.decode_metadata(codec.encode_metadata({"a": "b"})) == {"a": "b"}
    assert codec.encode_metadata({}) == codec.encode_metadata(None) == b""
    assert codec.decode_metadata(b"") == {}
    with pytest.raises(InvalidRequest, match="limit 65536"):
        codec.encode_metadata({str(i): "x" * 1024 for i in range(100)})


def test_a_client_frame_is_pairs_of_job_and_event() -> None:
    assert codec.decode_frame(msgpack.packb([["j1", b"e1"], ["j2", b"e2"]])) == [("j1", b"e1"), ("j2", b"e2")]
    for rubbish in (b"", msgpack.packb(5), msgpack.packb([1]), msgpack.packb([["j", 1, 2]])):
        with pytest.raises(UndecodableRecord, match="client frame"):
            codec.decode_frame(rubbish)


class TestWorkerRecords:
    def test_a_record_survives_the_journey(self) -> None:
        record = WorkerRecord("w1", model="m", draining=True, free_tokens=5, tokens_per_s=0.5)
        assert WorkerRecord.decode(record.encode()) == record

    def test_fields_of_a_later_version_are_ignored_and_whole_floats_read(self) -> None:
        data = codec.encode_fields({"worker_id": "w1", "moods": ["calm"], "tokens_per_s": 3})
        assert WorkerRecord.decode(data) == WorkerRecord("w1", tokens_per_s=3)

    @pytest.mark.parametrize("fields", [{}, {"worker_id": 5}, {"worker_id": "w", "pid": "x"}])
    def test_an_unreadable_record_is_refused(self, fields) -> None:
        with pytest.raises(UndecodableRecord, match="worker record"):
            WorkerRecord.decode(codec.encode_fields(fields))
