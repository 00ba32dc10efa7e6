"""Structured output: nothing outside the grammar is sampled, drafts leave no trace, bad grammars never get in."""

from __future__ import annotations

import json
import re

import jsonschema
import numpy as np
import pytest
import torch

from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import ResponseFormat, SamplingParams
from penstock_core.sampling import NO_TOKEN, GrammarCompiler, Sampler, SamplingTable, check_response_format
from tests.unit.sampling import vocabularies

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "maxItems": 2, "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
FORMATS = {
    "json_schema": ResponseFormat(json_schema=SCHEMA),
    "regex": ResponseFormat(regex=r"[a-c]{2,5}\d+ (é|🙂)"),
    "choice": ResponseFormat(choice=("yes", 'no "really"\n', "vielleicht ✓")),
    "grammar": ResponseFormat(grammar='start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/'),
}
KINDS = {"byte_level": vocabularies.byte_level, "sentencepiece": vocabularies.sentencepiece}


def table_for(kind: str) -> SamplingTable:
    tokenizer = KINDS[kind]()
    eos = tokenizer.eos_token_id
    grammars = GrammarCompiler(tokenizer.to_json(), tokenizer.vocab_size, [eos])
    return SamplingTable(3, tokenizer.vocab_size, eos_token_ids=[eos], tokenizer=tokenizer, grammars=grammars)


def generate(
    table: SamplingTable, eos: int, params: SamplingParams, seed: int, limit: int = 200
) -> tuple[list[int], bool]:
    """Random logits, so that only the grammar gives the text its form; (tokens, whether it came to an end)."""
    table.add(0, params, seed, 0)
    rng, output = np.random.default_rng(seed), []
    for position in range(limit):
        logits = torch.from_numpy(rng.standard_normal((1, table.vocab_size)).astype(np.float32))
        token = int(Sampler().sample(table, logits, np.array([0]), np.array([position])).token_ids[0])
        if token == eos:
            return output, True
        assert token != NO_TOKEN
        output.append(token)
        table.append([0], [token])
        if table.complete(0):
            return output, True
    return output, False


def follows(name: str, text: str) -> bool:
    response_format = FORMATS[name]
    if name == "json_schema":
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    if name == "choice":
        return text in (response_format.choice or ())
    pattern = response_format.regex if name == "regex" else r"<[a-z]{1,3}(,[a-z]{1,3})*>"
    return re.fullmatch(pattern or "", text) is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_the_logits_the_text_follows_the_grammar(name: str, kind: str) -> None:
    table, tokenizer = table_for(kind), KINDS[kind]()
    ended = 0
    for seed in range(8):
        params = SamplingParams(response_format=FORMATS[name], temperature=2.0)
        tokens, complete = generate(table, tokenizer.eos_token_id, params, seed)
        ended += complete
        text = b"".join(tokenizer.token_bytes(token) for token in tokens).decode()
        assert not complete or follows(name, text), text
    assert ended


def test_a_resumed_grammar_continues_where_the_tokens_left_it() -> None:
    table, tokenizer = table_for("byte_level"), vocabularies.byte_level()
    params = SamplingParams(response_format=FORMATS["json_schema"])
    tokens, _ = generate(table, tokenizer.eos_token_id, params, 4, limit=12)
    table.add(1, params, 4, 0, output_ids=tokens)
    masks = torch.zeros(2, table.vocab_size)
    table.edits(np.array([0, 1]), np.full(2, len(tokens)), np.array([-1, -1])).apply(masks)
    assert torch.equal(masks[0], masks[1])
    assert masks.isinf().any()


def test_a_satisfied_grammar_that_cannot_go_on_is_complete() -> None:
    table, tokenizer = table_for("byte_level"), vocabularies.byte_level()
    table.add(0, SamplingParams(response_format=FORMATS["choice"]), 0, 0)
    for token in tokenizer.encode("yes", add_special=False):
        assert not table.complete(0)
        table.append([0], [token])
    assert table.complete(0)


def test_min_tokens_cannot_push_a_text_beyond_its_grammar() -> None:
    table, tokenizer = table_for("byte_level"), vocabularies.byte_level()
    params = SamplingParams(response_format=ResponseFormat(regex="a{0,3}"), min_tokens=50, max_tokens=60)
    tokens, complete = generate(table, tokenizer.eos_token_id, params, 1)
    assert complete
    assert tokenizer.decode(tokens) == "aaa"


def test_bad_words_that_leave_a_grammar_nothing_choose_nothing() -> None:
    table = table_for("byte_level")
    table.add(0, SamplingParams(response_format=ResponseFormat(choice=("x",)), bad_words=("x",)), 0, 0)
    tokens = Sampler().sample(table, torch.zeros(1, table.vocab_size), np.array([0]), np.array([0])).token_ids
    assert tokens[0] == NO_TOKEN


@pytest.mark.parametrize(
    ("response_format", "field"),
    [
        (ResponseFormat(regex="(a"), "regex"),
        (ResponseFormat(regex="a(?=b)"), "regex"),
        (ResponseFormat(json_schema={"type": "objct"}), "json_schema"),
        (ResponseFormat(json_schema={"type": "array", "uniqueItems": True}), "json_schema"),
        (ResponseFormat(json_schema={"$ref": "#/nowhere"}), "json_schema"),
        (ResponseFormat(grammar='start: "a" other'), "grammar"),
    ],
)
def test_a_grammar_that_does_not_compile_is_refused_by_name(response_format: ResponseFormat, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_response_format(response_format)
    assert refused.value.field == f"sampling.response_format.{field}"
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_good_grammar_passes_the_door_without_a_tokenizer(name: str) -> None:
    check_response_format(FORMATS[name])
