"""From flags to requests: every option has a flag, none is invented, and what is not given is not passed on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli import generation
from penstock.cli.app import app
from penstock.cli.exits import CommandFailed
from penstock_core.protocol.requests import GenerationRequest, JobOptions, SamplingParams


def build(**given):
    return generation.build(given)


def test_every_sampling_and_delivery_option_has_a_flag():
    sampling, delivery = generation.field_names()
    assert sampling == set(SamplingParams.model_fields)
    assert delivery == set(JobOptions.model_fields)


def test_every_field_the_module_reads_is_an_option_of_submit():
    page = CliRunner().invoke(app, ["submit", "--help"], env={"COLUMNS": "120"}).stdout
    flags = set(re.findall(r"--([a-z-]+)", page))
    sampling, delivery = generation.field_names()
    renamed = {"deadline_s": "deadline", "delay_s": "delay", "result_ttl_s": "result_ttl"}
    renamed |= {"skip_special_tokens": "keep_special_tokens"}
    expected = {renamed.get(name, name).replace("_", "-") for name in sampling | delivery} - {"response-format"}
    assert expected <= flags
    assert {"json-schema", "regex", "choice", "grammar"} <= flags


def test_defaults_named_in_the_help_are_the_protocols():
    page = CliRunner().invoke(app, ["submit", "--help"], env={"COLUMNS": "120"}).stdout
    shown = dict(re.findall(r"--([a-z-]+) <[^>]*>[^\[\n]*\[default: ([^\]]+)\]", page))
    fields = SamplingParams.model_fields | JobOptions.model_fields
    names = {"max-tokens": "max_tokens", "temperature": "temperature", "n": "n", "priority": "priority"}
    names |= {"tenant": "tenant", "max-retries": "max_retries", "durability": "durability"}
    for flag, field in names.items():
        assert shown[flag] == str(fields[field].default), flag
    assert float(shown["result-ttl"]) == fields["result_ttl_s"].default


def test_nothing_given_leaves_every_default_to_the_protocol():
    request, options = build(prompt="hello")
    assert request == GenerationRequest(prompt="hello")
    assert request.model_fields_set == {"prompt"}
    assert options.model_fields_set == set()


def test_options_arrive_where_they_belong():
    request, options = build(
        prompt="hello", temperature=0.0, max_tokens=0, stop=["END"], stop_token_ids="1, 2", logit_bias=["7=1.5"],
        keep_special_tokens=True, ignore_eos=True, n=2, choice=["yes", "no"], model="m",
        priority=9, tenant="web", deadline=3.0, delay=1.0, result_ttl=60.0, metadata=["a=b=c"], affinity="",
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.stop, sampling.stop_token_ids) == (
        0,
        None,
        ("END",),
        (1, 2),
    )
    assert sampling.logit_bias == {7: 1.5}
    assert not sampling.skip_special_tokens
    assert sampling.ignore_eos
    assert sampling.n == 2
    assert sampling.response_format is not None
    assert sampling.response_format.choice == ("yes", "no")
    assert request.model == "m"
    assert (options.priority, options.tenant, options.deadline_s, options.delay_s) == (9, "web", 3.0, 1.0)
    assert (options.result_ttl_s, options.metadata, options.affinity) == (60.0, {"a": "b=c"}, "")


def test_chat_and_system_make_messages():
    request, _ = build(prompt="hi", chat=True)
    assert [(m.role, m.content) for m in request.messages or ()] == [("user", "hi")]
    request, _ = build(prompt="hi", system="be kind")
    assert [(m.role, m.content) for m in request.messages or ()] == [("system", "be kind"), ("user", "hi")]


def test_messages_and_formats_are_read_from_files(tmp_path: Path):
    conversation = tmp_path / "talk.json"
    conversation.write_text('[{"role": "user", "content": "hi"}]')
    request, _ = build(messages=str(conversation))
    assert (request.messages or ())[0].content == "hi"
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    request, _ = build(prompt="x", json_schema=f"@{schema}")
    assert request.sampling.response_format is not None
    assert request.sampling.response_format.json_schema == {"type": "object"}


@pytest.mark.parametrize("text", ["1,2,3", "1 2 3", "[1, 2, 3]"])
def test_token_ids_are_read_in_three_ways(text: str):
    assert build(token_ids=text)[0].prompt_token_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("text", "seconds"), [("1900000000.5", 1900000000.5), ("2030-03-17T17:46:40+00:00", 1900000000)]
)
def test_a_start_time_is_a_number_or_iso_8601(text: str, seconds: float):
    assert build(prompt="x", not_before=text)[1].not_before == seconds


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--priority", "12"], "error: priority: 12 is above 9; give at most 9"),
        (["--temperature", "nan"], "error: temperature: Input should be a finite number, got nan"),
        (["--top-p", "0"], "error: top_p: "),
        (["--tenant", "a b"], "error: tenant: "),
        (["--logit-bias", "x"], "error: logit_bias: 'x' is no KEY=VALUE pair"),
        (["--logit-bias", "x=y"], "error: logit_bias."),
        (["--metadata", "x"], "error: metadata: 'x' is no KEY=VALUE pair"),
        (["--stop-token-ids", "a"], "error: stop_token_ids: 'a' is no list of token ids; write them as 1,2,3"),
        (["--json-schema", "{"], "error: json_schema: is no JSON"),
        (["--json-schema", "@/none"], "error: json_schema: cannot read '/none': No such file"),
        (["--messages", "/none"], "error: messages: cannot read '/none': No such file"),
        (["--messages", "[1"], "error: messages: is no JSON"),
        (["--not-before", "soon"], "error: not_before: 'soon' is no time"),
        (["--regex", "a", "--grammar", "b"], "error: response_format: give exactly one of"),
        (["--token-ids", "1,2"], "error: prompt: PROMPT and --token-ids are both given; give one"),
        (["--delay", "1", "--not-before", "5"], "error: request: give delay_s or not_before, not both"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_sent(args: list[str], line: str):
    """The broker named here does not exist: the refusal must come first."""
    prompt = [] if "--messages" in args else ["hello"]
    outcome = CliRunner().invoke(app, ["submit", *prompt, *args, "--redis", "redis://127.0.0.1:1"])
    assert outcome.stderr.startswith(line)
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert outcome.exit_code == 2


def test_an_empty_prompt_is_refused():
    with pytest.raises(CommandFailed, match="prompt: is empty"):
        build(prompt="")


def test_stdin_that_is_no_text_is_refused():
    outcome = CliRunner().invoke(app, ["submit", "-", "--redis", "redis://127.0.0.1:1"], input=b"\xff\xfe")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: prompt: stdin is not UTF-8 at byte 0")
