"""From the options of `penstock submit` to a validated `GenerationRequest` and `JobOptions`.

Every sampling and delivery option has a flag here; an option that is not given is not passed on, so the defaults live
in the protocol alone. A test holds the two lists equal.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.exits import invalid
from penstock.cli.terminal import is_terminal

if TYPE_CHECKING:
    from penstock_core.protocol.requests import GenerationRequest, JobOptions

_SAMPLING, _SHAPE, _DELIVERY = "Sampling", "Shape of the output", "Delivery"


def _option(panel: str, name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=panel, help=text, show_default=False)


def _flag(panel: str, name: str, text: str) -> Any:
    return typer.Option(name, rich_help_panel=panel, help=text, show_default=False)


Temperature = Annotated[
    float | None, _option(_SAMPLING, "--temperature", "X", "Randomness; 0 is greedy. [default: 1.0]")
]
TopK = Annotated[int | None, _option(_SAMPLING, "--top-k", "K", "Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float | None, _option(_SAMPLING, "--top-p", "P", "Keep the likeliest tokens up to probability p.")]
MinP = Annotated[float | None, _option(_SAMPLING, "--min-p", "P", "Drop tokens below p times the likeliest.")]
Seed = Annotated[
    int | None, _option(_SAMPLING, "--seed", "N", "Same seed, same tokens, on any worker. [default: random]")
]
Presence = Annotated[float | None, _option(_SAMPLING, "--presence-penalty", "X", "-2 to 2; OpenAI's definition.")]
Frequency = Annotated[float | None, _option(_SAMPLING, "--frequency-penalty", "X", "-2 to 2; OpenAI's definition.")]
Repetition = Annotated[float | None, _option(_SAMPLING, "--repetition-penalty", "X", "Above 0; 1 is none (CTRL's).")]
LogitBias = Annotated[
    list[str] | None, _option(_SAMPLING, "--logit-bias", "ID=X", "Add X to the logit of a token; repeatable.")
]
AllowedIds = Annotated[
    str | None, _option(_SAMPLING, "--allowed-token-ids", "IDS", "Sample only these token ids (1,2,3 or a JSON list).")
]
BadWords = Annotated[list[str] | None, _option(_SAMPLING, "--bad-words", "TEXT", "Never complete this; repeatable.")]

MaxTokens = Annotated[
    int | None, _option(_SHAPE, "--max-tokens", "N", "Output limit; 0: all the model's context allows. [default: 256]")
]
MinTokens = Annotated[int | None, _option(_SHAPE, "--min-tokens", "N", "No end before this many tokens.")]
Choices = Annotated[int | None, _option(_SHAPE, "--n", "N", "Number of answers. [default: 1]")]
BestOf = Annotated[int | None, _option(_SHAPE, "--best-of", "N", "Generate this many, return the n likeliest.")]
Stop = Annotated[list[str] | None, _option(_SHAPE, "--stop", "TEXT", "End at this text; repeatable.")]
StopIds = Annotated[str | None, _option(_SHAPE, "--stop-token-ids", "IDS", "End at any of these token ids.")]
IncludeStop = Annotated[bool, _flag(_SHAPE, "--include-stop", "Keep the stop text in the output.")]
IgnoreEos = Annotated[bool, _flag(_SHAPE, "--ignore-eos", "Go on past the model's end of sequence.")]
Echo = Annotated[bool, _flag(_SHAPE, "--echo", "Begin the output with the prompt.")]
KeepSpecial = Annotated[bool, _flag(_SHAPE, "--keep-special-tokens", "Show special tokens in the text.")]
Logprobs = Annotated[
    int | None, _option(_SHAPE, "--logprobs", "K", "Log-probabilities of the tokens and of k alternatives.")
]
PromptLogprobs = Annotated[int | None, _option(_SHAPE, "--prompt-logprobs", "K", "The same for the prompt's tokens.")]
JsonSchema = Annotated[
    str | None, _option(_SHAPE, "--json-schema", "JSON|@FILE", "The output is JSON of this schema; {} for any.")
]
Regex = Annotated[str | None, _option(_SHAPE, "--regex", "PATTERN", "The output matches this expression.")]
Choice = Annotated[list[str] | None, _option(_SHAPE, "--choice", "TEXT", "The output is one of these; repeatable.")]
Grammar = Annotated[str | None, _option(_SHAPE, "--grammar", "LARK|@FILE", "The output follows this grammar.")]

Priority = Annotated[int | None, _option(_DELIVERY, "--priority", "0-9", "9 is served first, 0 last. [default: 5]")]
Tenant = Annotated[str | None, _option(_DELIVERY, "--tenant", "NAME", "Whose job it is. [default: default]")]
Deadline = Annotated[
    float | None, _option(_DELIVERY, "--deadline", "SECONDS", "Expire the job this long after submission.")
]
Delay = Annotated[float | None, _option(_DELIVERY, "--delay", "SECONDS", "Do not start it before.")]
NotBefore = Annotated[
    str | None, _option(_DELIVERY, "--not-before", "TIME", "The same as a time: ISO 8601 or seconds since 1970.")
]
Retries = Annotated[
    int | None, _option(_DELIVERY, "--max-retries", "N", "Retries after errors; crashes cost none. [default: 3]")
]
IdempotencyKey = Annotated[
    str | None, _option(_DELIVERY, "--idempotency-key", "KEY", "The same key returns the same job.")
]
ResultTtl = Annotated[
    float | None, _option(_DELIVERY, "--result-ttl", "SECONDS", "Keep the result this long. [default: 3600]")
]
Affinity = Annotated[
    str | None, _option(_DELIVERY, "--affinity", "TAG", "Prefer the worker that last ran this tag; '' for none.")
]
Metadata = Annotated[
    list[str] | None, _option(_DELIVERY, "--metadata", "KEY=VALUE", "Carried along with the job; repeatable.")
]
Traceparent = Annotated[str | None, _option(_DELIVERY, "--traceparent", "W3C", "Trace context of the caller.")]
Durability = Annotated[
    str | None, _option(_DELIVERY, "--durability", "LEVEL", "memory, or fsync: wait for the disk. [default: memory]")
]

_PLAIN_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "seed", "n", "best_of", "min_tokens", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logprobs", "prompt_logprobs", "stop", "bad_words",
)  # fmt: skip
_FLAGS = ("include_stop", "ignore_eos", "echo")
_PLAIN_DELIVERY = (
    "priority", "tenant", "max_retries", "idempotency_key", "affinity", "traceparent", "durability",
)  # fmt: skip
_RENAMED_DELIVERY = {"deadline": "deadline_s", "delay": "delay_s", "result_ttl": "result_ttl_s"}
_FORMATS = ("json_schema", "regex", "choice", "grammar")


def sampling_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options among `given` (option name -> value or None), ready for `SamplingParams.parse`."""
    values = {name: given[name] for name in _PLAIN_SAMPLING if given.get(name) not in (None, [], ())}
    values |= {name: True for name in _FLAGS if given.get(name)}
    if given.get("max_tokens") is not None:
        values["max_tokens"] = given["max_tokens"] or None
    if given.get("keep_special_tokens"):
        values["skip_special_tokens"] = False
    for name in ("stop_token_ids", "allowed_token_ids"):
        if given.get(name) is not None:
            values[name] = token_ids(name, given[name])
    if given.get("logit_bias"):
        pairs = dict(_pair("logit_bias", entry) for entry in given["logit_bias"])
        values["logit_bias"] = {key.strip(): value for key, value in pairs.items()}
    chosen = {name: given[name] for name in _FORMATS if given.get(name) not in (None, [], ())}
    if chosen:
        values["response_format"] = {name: _format_value(name, value) for name, value in chosen.items()}
    return values


def delivery_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The delivery options among `given`, ready for `JobOptions.parse`."""
    values = {name: given[name] for name in _PLAIN_DELIVERY if given.get(name) is not None}
    values |= {field: given[name] for name, field in _RENAMED_DELIVERY.items() if given.get(name) is not None}
    if given.get("not_before") is not None:
        values["not_before"] = _epoch_seconds(given["not_before"])
    if given.get("metadata"):
        values["metadata"] = dict(_pair("metadata", entry) for entry in given["metadata"])
    return values


def build(given: Mapping[str, Any]) -> tuple[GenerationRequest, JobOptions]:
    """The request and the delivery options that the command line describes.

    Raises:
        InvalidRequest: a value is out of its limits.
        CommandFailed: a value cannot be read at all.
    """
    from penstock_core.protocol.requests import GenerationRequest, JobOptions

    options = JobOptions.parse(delivery_values(given))
    values: dict[str, Any] = _prompt_values(given)
    sampling = sampling_values(given)
    if sampling:
        from penstock_core.protocol.requests import SamplingParams

        values["sampling"] = SamplingParams.parse(sampling)
    if given.get("model") is not None:
        values["model"] = given["model"]
    return GenerationRequest.parse(values), options


def _prompt_values(given: Mapping[str, Any]) -> dict[str, Any]:
    text, ids, messages = given.get("prompt"), given.get("token_ids"), given.get("messages")
    forms = [name for name, value in (("PROMPT", text), ("--token-ids", ids), ("--messages", messages)) if value]
    if len(forms) > 1:
        invalid("prompt", f"{' and '.join(forms)} are both given; give one")
    if ids is not None:
        return {"prompt_token_ids": token_ids("token_ids", ids)}
    if messages is not None:
        return {"messages": _messages(messages)}
    if text is None or text == "-":
        if text is None and is_terminal(sys.stdin):
            invalid("prompt", 'nothing to generate from; write it after the command ("Once upon a time") or pipe it in')
        text = _stdin("prompt")
    if text == "":
        invalid("prompt", "is empty; give at least one character")
    if given.get("chat") or given.get("system") is not None:
        system = [{"role": "system", "content": given["system"]}] if given.get("system") is not None else []
        return {"messages": [*system, {"role": "user", "content": text}]}
    return {"prompt": text}


def _stdin(field: str) -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        invalid(field, f"stdin is not UTF-8 at byte {error.start}; convert it first (iconv -t utf-8)")


def _messages(source: str) -> list[Any]:
    text = (
        _stdin("messages")
        if source == "-"
        else source
        if source.lstrip().startswith("[")
        else _file("messages", source)
    )
    value = _json("messages", text)
    if not isinstance(value, list):
        invalid("messages", f'is {type(value).__name__}, not a list like [{{"role": "user", "content": "..."}}]')
    return value


def token_ids(field: str, text: str) -> list[int]:
    """Token ids from `1,2,3`, `1 2 3` or a JSON list."""
    try:
        return [int(part) for part in text.strip().strip("[]").replace(",", " ").split()]
    except ValueError:
        shown = text if len(text) <= 40 else text[:37] + "..."
        invalid(field, f"{shown!r} is no list of token ids; write them as 1,2,3")


def _epoch_seconds(text: str) -> float:
    """Seconds since 1970 from a number or an ISO 8601 time; a time without a zone is local."""
    with contextlib.suppress(ValueError):
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        invalid("not_before", f"{text!r} is no time; write it as 2030-01-31T18:00 or in seconds since 1970")


def _pair(field: str, entry: str) -> tuple[str, str]:
    key, equals, value = entry.partition("=")
    if not equals or not key:
        invalid(field, f"{entry!r} is no KEY=VALUE pair")
    return key, value


def _format_value(name: str, value: Any) -> Any:
    if name == "json_schema":
        return _json("json_schema", _text_or_file(name, value))
    if name == "grammar":
        return _text_or_file(name, value)
    return value


def _text_or_file(field: str, value: str) -> str:
    return _file(field, value[1:]) if value.startswith("@") else value


def _file(field: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        invalid(field, f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}")


def _json(field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        invalid(field, f"is no JSON: {error}")


def field_names() -> tuple[set[str], set[str]]:
    """Names of the sampling and delivery fields that the command line can set."""
    sampling = {*_PLAIN_SAMPLING, *_FLAGS, "max_tokens", "skip_special_tokens", "stop_token_ids", "allowed_token_ids"}
    delivery = {*_PLAIN_DELIVERY, *_RENAMED_DELIVERY.values(), "metadata", "not_before"}
    return sampling | {"logit_bias", "response_format"}, delivery
