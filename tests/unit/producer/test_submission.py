"""From keywords to a job: every option known, every bad one named, every job repeatable."""

from __future__ import annotations

from typing import Any, get_type_hints

import hypothesis
import pytest
from hypothesis import strategies as st

from penstock.settings import ClientSettings, resolve_queue, resolve_url
from penstock.submission import KNOWN_OPTIONS, JobItem, SubmitOptions, new_job_id, prepare, prepare_many
from penstock_core.protocol.codec import decode_request
from penstock_core.protocol.errors import InvalidConfiguration, InvalidRequest
from penstock_core.protocol.requests import GenerationRequest, SamplingParams

SETTINGS = ClientSettings("redis://localhost", "q", tenant="acme")


def request_of(**given: Any) -> GenerationRequest:
    return decode_request(prepare(SETTINGS, given).request)


def test_the_typed_keywords_are_exactly_the_options_there_are() -> None:
    assert set(get_type_hints(SubmitOptions)) == KNOWN_OPTIONS - {"prompt"}
    assert set(get_type_hints(JobItem)) == KNOWN_OPTIONS


def test_a_misspelt_option_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(InvalidRequest, match=r"temprature: unknown option; did you mean 'temperature'\?"):
        prepare(SETTINGS, {"prompt": "x", "temprature": 1})
    with pytest.raises(InvalidRequest, match="zzz: unknown option; see SubmitOptions"):
        prepare(SETTINGS, {"prompt": "x", "zzz": 1})
    with pytest.raises(InvalidRequest, match=r"sampling\.temprature: unknown option"):
        prepare(SETTINGS, {"prompt": "x", "sampling": {"temprature": 1}})


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompt": "x", "temperature": float("nan")}, "sampling.temperature"),
        ({"prompt": "x", "priority": 12}, "priority"),
        ({"prompt": "x", "tenant": "no/slash"}, "tenant"),
        ({"prompt": "x", "sampling": {"n": 0}}, "sampling.n"),
        ({"prompt": "x", "sampling": 3}, "sampling"),
        ({"prompt": "x", "sampling": 3, "n": 1}, "sampling"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a lone surrogate \ud800"}, "prompt"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ({"request": "x"}, "request"),
        ({"request": GenerationRequest(prompt="x"), "prompt": "y"}, "prompt"),
        ({}, "request"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, "request"),
        ({"prompt": "x", "delay_s": 1, "not_before": 1}, "request"),
    ],
)
def test_a_bad_value_is_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare(SETTINGS, given)
    assert caught.value.field == field


def test_an_item_is_named_by_its_index() -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare_many(SETTINGS, ["fine", {"prompt": "x", "priority": -1}])
    assert caught.value.field == "jobs[1].priority"
    with pytest.raises(InvalidRequest, match=r"jobs\[0\]: expected a prompt or a mapping.*got int"):
        prepare_many(SETTINGS, [3])  # type: ignore[list-item]


def test_single_options_win_over_a_set_of_them() -> None:
    base = SamplingParams(temperature=0.5, seed=3)
    assert request_of(prompt="x", sampling=base).sampling == base
    assert request_of(prompt="x", sampling=base, temperature=0.7).sampling == SamplingParams(temperature=0.7, seed=3)
    assert request_of(prompt="x", sampling={"top_k": 3, "seed": 1}, top_k=4).sampling == SamplingParams(top_k=4, seed=1)


def test_a_ready_request_is_taken_as_it_is() -> None:
    ready = GenerationRequest(prompt="x", sampling=SamplingParams(seed=4), model="m")
    assert request_of(request=ready) == ready
    assert request_of(request=ready, max_tokens=7) == ready.model_copy(
        update={"sampling": SamplingParams(seed=4, max_tokens=7)}
    )


def test_a_stop_string_alone_is_one_stop_string() -> None:
    assert request_of(prompt="x", stop="end").sampling.stop == ("end",)
    assert request_of(prompt="x", sampling={"stop": "end"}).sampling.stop == ("end",)
    assert request_of(prompt="x", stop=["a", "b"]).sampling.stop == ("a", "b")


def test_every_job_has_a_seed_and_keeps_its_own() -> None:
    seeds = {request_of(prompt="x").sampling.seed for _ in range(50)}
    assert None not in seeds
    assert len(seeds) == 50
    assert request_of(prompt="x", seed=7).sampling.seed == 7


ORDINARY = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=300),
        "prompt_token_ids": st.lists(
            st.integers(-1, 5)
            | st.sampled_from([2**31 - 1, 2**31, 2**63, True, 1.0, 1.5, "1"])
            | st.integers(0, 2**31),
            max_size=200,
        ),
        "max_tokens": st.sampled_from([1, True, 1.0, 32, None, 0]),
        "temperature": st.sampled_from([0, 0.5, 1, True, float("nan"), "1"]),
        "seed": st.sampled_from([0, 7, True, 2**63 - 1, 2**63, -1, 1.0]),
        "stop": st.sampled_from(["end", "", ("a", "b")]),
        "n": st.sampled_from([1, 3]),
        "min_tokens": st.integers(0, 40),
        "ignore_eos": st.booleans(),
    },
)


@hypothesis.given(given=ORDINARY)
def test_an_ordinary_job_travels_as_if_validated_field_by_field(given: dict[str, Any]) -> None:
    """Jobs of a usual form take a shorter way, which must lead to the same place, and to the same refusals."""
    options = {name: value for name, value in given.items() if name not in ("prompt", "prompt_token_ids")}
    options = {"seed": 1} | options
    request = {name: given[name] for name in ("prompt", "prompt_token_ids") if name in given}
    if isinstance(options.get("stop"), str):
        options["stop"] = (options["stop"],)
    try:
        wanted = GenerationRequest.parse(request | {"sampling": SamplingParams.parse(options)})
    except InvalidRequest:
        with pytest.raises(InvalidRequest):
            prepare(SETTINGS, {"seed": 1} | given)
        return
    for _ in range(2):  # the options are known the second time
        job = prepare(SETTINGS, {"seed": 1} | given)
        assert decode_request(job.request) == wanted
        assert job.input_tokens == wanted.estimated_prompt_tokens()
        assert job.output_tokens == wanted.estimated_output_tokens()


def test_tenant_and_model_come_from_the_client_unless_said() -> None:
    settings = ClientSettings("redis://localhost", "q", model="m", tenant="acme")
    job = prepare(settings, {"prompt": "x"})
    assert (job.options.tenant, decode_request(job.request).model) == ("acme", "m")
    job = prepare(settings, {"prompt": "x", "tenant": "other", "model": "n"})
    assert (job.options.tenant, decode_request(job.request).model) == ("other", "n")


def test_ids_sort_by_submission() -> None:
    ids = [new_job_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert [job_id[:14] for job_id in ids] == sorted(job_id[:14] for job_id in ids)
    assert {len(job_id) for job_id in ids} == {32}


LONG = "You are a helpful assistant. " * 40


@pytest.mark.parametrize(
    "forms",
    [
        [{"prompt": LONG + "a"}, {"prompt": LONG + "b"}],
        [{"prompt_token_ids": [*range(500), 1]}, {"prompt_token_ids": [*range(500), 2]}],
        [
            {"messages": [{"role": "system", "content": LONG}]},
            {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": "hi"}]},
        ],
    ],
    ids=["text", "ids", "turns of a conversation"],
)
def test_prompts_with_one_beginning_share_an_affinity_tag_within_a_tenant(forms: list[dict[str, Any]]) -> None:
    tags = {prepare(SETTINGS, form).affinity for form in forms}
    assert len(tags) == 1
    assert tags != {""}
    assert tags == {prepare(SETTINGS, {"request": GenerationRequest.parse(form)}).affinity for form in forms}
    assert tags.isdisjoint({prepare(SETTINGS, {**form, "tenant": "other"}).affinity for form in forms})


def test_a_short_prompt_prefers_no_worker_and_a_given_tag_wins() -> None:
    assert prepare(SETTINGS, {"prompt": "short"}).affinity == ""
    assert prepare(SETTINGS, {"prompt": LONG, "affinity": "mine"}).affinity == "mine"
    assert prepare(SETTINGS, {"prompt": LONG, "affinity": ""}).affinity == ""


def test_url_and_queue_come_from_the_argument_then_the_environment_then_the_default() -> None:
    assert resolve_url("redis://a", {"PENSTOCK_REDIS_URL": "redis://b"}) == "redis://a"
    assert resolve_url(None, {"PENSTOCK_REDIS_URL": "redis://b"}) == "redis://b"
    assert resolve_url(None, {}) == "redis://127.0.0.1:6379"
    assert resolve_queue("a", "m", {"PENSTOCK_QUEUE": "e"}) == "a"
    assert resolve_queue(None, "m", {"PENSTOCK_QUEUE": "e"}) == "m"
    assert resolve_queue(None, None, {"PENSTOCK_QUEUE": "e"}) == "e"
    assert resolve_queue(None, None, {}) == "penstock-story"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"queue": "no spaces"}, "queue"),
        ({"mode": "pull"}, "mode"),
        ({"tenant": "a/b"}, "tenant"),
        ({"patience_s": 0}, "patience_s"),
        ({"patience_s": float("nan")}, "patience_s"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises((InvalidConfiguration, InvalidRequest), match=f"^{field}: "):
        ClientSettings(**{"url": "redis://localhost", "queue": "q", **given})
