"""Sampled tokens follow the distribution that was asked for, and every option is honoured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import ResponseFormat, SamplingParams
from penstock_core.sampling import NO_TOKEN, GrammarCompiler, Sampler, SamplingTable, prompt_logprobs
from tests.unit.sampling import vocabularies
from tests.unit.sampling.reference import chi_squared_p_value, distribution

VOCAB = 200
RNG = np.random.default_rng(11)
LOGITS = (RNG.standard_normal(VOCAB) * 2).astype(np.float32)


def sample(
    params: SamplingParams,
    logits: np.ndarray = LOGITS,
    *,
    prompt: list[int] = [],  # noqa: B006
    output: list[int] = [],  # noqa: B006
    seed: int = 5,
    draws: int = 1,
    table: SamplingTable | None = None,
) -> np.ndarray:
    """`draws` tokens at consecutive positions (as if at each the output were `output`)."""
    table = table or SamplingTable(1, logits.shape[-1], eos_token_ids=[0])
    table.add(0, params, seed, 0, prompt, output)
    rows = torch.from_numpy(np.repeat(logits[None], draws, 0))
    return Sampler().sample(table, rows, np.zeros(draws, dtype=np.int64), len(output) + np.arange(draws)).token_ids


COMBINATIONS = {
    "temperature 1": SamplingParams(),
    "temperature 0.5": SamplingParams(temperature=0.5),
    "temperature 3": SamplingParams(temperature=3.0),
    "top_k": SamplingParams(top_k=20),
    "top_p": SamplingParams(top_p=0.8),
    "wide top_p": SamplingParams(top_p=0.99, temperature=4.0),
    "min_p": SamplingParams(min_p=0.05),
    "all": SamplingParams(top_k=50, top_p=0.9, min_p=0.02, temperature=1.3),
}


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("chunk", [1, 4000])
def test_frequencies_follow_the_filtered_distribution(name: str, chunk: int) -> None:
    params = COMBINATIONS[name]
    draws = 12_000 if chunk > 1 else 300
    counts = np.bincount(
        np.concatenate([sample(params, seed=i, draws=chunk) for i in range(draws // chunk)]), minlength=VOCAB
    )
    expected = distribution(LOGITS.tolist(), params)
    assert set(np.flatnonzero(counts)) <= set(expected)
    probabilities = np.array([expected.get(token, 0.0) for token in range(VOCAB)])
    assert chi_squared_p_value(counts, probabilities) > 1e-4


def test_greedy_takes_the_most_likely_token_and_the_lowest_of_equals() -> None:
    logits = LOGITS.copy()
    logits[[7, 70, 150]] = 20.0
    assert sample(SamplingParams(temperature=0.0), logits)[0] == 7
    assert sample(SamplingParams(temperature=1e-9, top_p=0.5, min_p=0.1), logits)[0] == 7


def test_the_same_seed_repeats_and_another_differs() -> None:
    flat = np.zeros(VOCAB, dtype=np.float32)
    assert np.array_equal(sample(SamplingParams(), flat, draws=50), sample(SamplingParams(), flat, draws=50))
    assert not np.array_equal(
        sample(SamplingParams(), flat, draws=50), sample(SamplingParams(), flat, seed=6, draws=50)
    )


def test_extreme_temperatures_stay_finite() -> None:
    assert sample(SamplingParams(temperature=2e-5), LOGITS * 1e4)[0] == LOGITS.argmax()
    counts = np.bincount(sample(SamplingParams(temperature=100.0), draws=20_000), minlength=VOCAB)
    assert chi_squared_p_value(counts, np.exp(LOGITS / 100.0) / np.exp(LOGITS / 100.0).sum()) > 1e-4


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_choose_nothing_and_hurt_no_other_row(params: SamplingParams, bad: float) -> None:
    table = SamplingTable(3, VOCAB)
    for row in range(3):
        table.add(row, params, 9, 0)
    logits = np.repeat(LOGITS[None], 3, 0)
    logits[1, 17] = bad
    tokens = Sampler().sample(table, torch.from_numpy(logits), np.arange(3), np.zeros(3, dtype=np.int64)).token_ids
    assert tokens[1] == NO_TOKEN
    assert tokens[0] == tokens[2] == sample(params, seed=9)[0]


def test_penalties_are_openai_s_and_ctrl_s() -> None:
    params = SamplingParams(presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.5, logprobs=0)
    prompt, output = [1, 2, 3, 3], [3, 4, 4, 4]
    table = SamplingTable(1, VOCAB)
    table.add(0, params, 0, 0, prompt, output)
    logits = torch.from_numpy(LOGITS[None].copy())
    table.edits(np.array([0]), np.array([4]), np.array([-1])).apply(logits)
    expected = LOGITS.astype(np.float64)
    for token in {1, 2, 3, 4}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
        expected[token] -= 0.3 * output.count(token) + 0.7 * (token in output)
    assert np.allclose(logits.numpy()[0], expected, atol=1e-5)


def test_bias_moves_a_token_s_frequency_by_its_exponential() -> None:
    counts = np.bincount(sample(SamplingParams(logit_bias={3: 2.0, 9: -100.0}), draws=20_000), minlength=VOCAB)
    biased = LOGITS.astype(np.float64)
    biased[3] += 2.0
    biased[9] -= 100.0
    assert chi_squared_p_value(counts, np.exp(biased) / np.exp(biased).sum()) > 1e-4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_sampled(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, allowed_token_ids=(150, 2, 40), logit_bias={2: -50.0})
    tokens = set(sample(params, draws=2000).tolist())
    assert (
        tokens <= {150, 40} if temperature else tokens == {max((2, 40, 150), key=lambda t: LOGITS[t] - 50 * (t == 2))}
    )


def test_ends_of_text_wait_for_min_tokens() -> None:
    logits = LOGITS.copy()
    logits[[0, 5]] = 50.0
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(5,))
    tokens = sample(params, logits, draws=5)
    assert not set(tokens[:3]) & {0, 5}
    assert tokens[3:].tolist() == [0, 0]


def bad_word_table() -> SamplingTable:
    tokenizer = vocabularies.byte_level()
    return SamplingTable(4, tokenizer.vocab_size, tokenizer=tokenizer)


def test_a_bad_word_is_never_completed_at_its_start_or_inside_a_text() -> None:
    table = bad_word_table()
    tokenizer = vocabularies.byte_level()
    params = SamplingParams(temperature=0.0, bad_words=("gate", "zq"))
    for text in ("gate", " gate", "zq", " zq"):
        ids = tokenizer.encode(text, add_special=False)
        logits = np.zeros(tokenizer.vocab_size, dtype=np.float32)
        logits[ids[-1]] = 5.0
        assert sample(params, logits, output=ids[:-1], table=table)[0] != ids[-1]
        if len(ids) > 1:
            assert sample(params, logits, output=[*ids[:-2], 77], table=table)[0] == ids[-1]


RESTRICTIONS = {
    "penalties": SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
    "bad words": SamplingParams(bad_words=("gate", "ab", "a")),
    "min_tokens": SamplingParams(min_tokens=4, stop_token_ids=(7, 8, 9)),
    "grammar": SamplingParams(response_format=ResponseFormat(regex="(ab|gate|[0-9]+)*x")),
    "plain": SamplingParams(top_p=0.9),
    "greedy": SamplingParams(temperature=0.0, frequency_penalty=2.0),
}


def restricted_table(name: str, rows: int = 4) -> SamplingTable:
    tokenizer = vocabularies.byte_level()
    grammars = GrammarCompiler(tokenizer.to_json(), tokenizer.vocab_size, [1])
    return SamplingTable(rows, tokenizer.vocab_size, eos_token_ids=[1], tokenizer=tokenizer, grammars=grammars)


@pytest.mark.parametrize("name", RESTRICTIONS)
@pytest.mark.parametrize("wrong_at", [0, 2, 5, None])
def test_checking_drafts_chooses_the_tokens_of_plain_decoding(name: str, wrong_at: int | None) -> None:
    """Rows for several positions at once give, up to the first wrong draft, what one row at a time gives."""
    params, rng = RESTRICTIONS[name], np.random.default_rng(3)
    table = restricted_table(name)
    vocab, length = table.vocab_size, 6
    logits = (rng.standard_normal((length, vocab)) * 2).astype(np.float32)
    logits[:, 1] -= 5.0
    table.add(0, params, 3, 0, [5, 6])
    plain: list[int] = []
    for position in range(length):
        row = torch.from_numpy(logits[position : position + 1].copy())
        token = int(Sampler().sample(table, row, np.array([0]), np.array([position])).token_ids[0])
        plain.append(token)
        table.append([0], [token])
        if table.complete(0) or token == NO_TOKEN:
            break
    drafts = [-1, *plain[:-1]]
    if wrong_at is not None and wrong_at + 1 < len(drafts):
        drafts[wrong_at + 1] = (drafts[wrong_at + 1] + 1) % vocab
    for row in (0, 1):
        table.add(row, params, 3, 0, [5, 6])
    count = len(plain)
    both = (
        Sampler()
        .sample(
            table,
            torch.from_numpy(np.concatenate([logits[:1], logits[:count]])),
            np.array([1] + [0] * count),
            np.array([0, *range(count)]),
            np.array([-1, *drafts]),
        )
        .token_ids
    )
    right = count if wrong_at is None else min(count, wrong_at + 1)
    assert both[0] == plain[0]
    assert both[1 : 1 + right].tolist() == plain[:right]
    again = Sampler().sample(table, torch.from_numpy(logits[:1].copy()), np.array([0]), np.array([0])).token_ids
    assert again[0] == plain[0]  # drafts leave no trace


def test_a_preempted_row_continues_where_it_was() -> None:
    table = restricted_table("penalties", rows=2)
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3)
    table.add(0, params, 1, 2, [3, 4], [])
    table.append([0, 0, 0], [9, 9, 11])
    table.add(1, params, 1, 2, [3, 4], [9, 9, 11])
    logits = torch.zeros(2, table.vocab_size)
    tokens = Sampler().sample(table, logits, np.array([0, 1]), np.array([3, 3])).token_ids
    assert tokens[0] == tokens[1]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    params = SamplingParams(temperature=0.3, top_k=3, logprobs=5, logit_bias={8: 60.0}, presence_penalty=2.0)
    table = SamplingTable(2, VOCAB)
    table.add(1, params, 1, 0, [], [4])
    table.add(0, SamplingParams(), 1, 0)
    logits = torch.from_numpy(np.repeat(LOGITS[None], 2, 0))
    expected = torch.log_softmax(torch.from_numpy(LOGITS).double(), -1)
    result = Sampler().sample(table, logits, np.array([0, 1]), np.array([0, 1]))
    record = result.logprob(1)
    assert result.logprob(0) is None
    assert result.token_ids[1] == 8
    assert record is not None
    assert record.logprob == pytest.approx(float(expected[8]), abs=1e-5)
    best = expected.topk(5)
    assert [token for token, _ in record.top] == best.indices.tolist()
    assert [value for _, value in record.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_of_the_chosen_token_alone() -> None:
    table = SamplingTable(1, VOCAB)
    table.add(0, SamplingParams(logprobs=0), 1, 0)
    record = Sampler().sample(table, torch.from_numpy(LOGITS[None].copy()), np.array([0]), np.array([0])).logprob(0)
    assert record is not None
    assert record.top == ()


def test_prompt_logprobs() -> None:
    logits = torch.from_numpy((RNG.standard_normal((7, VOCAB)) * 3).astype(np.float32))
    targets = RNG.integers(VOCAB, size=7)
    expected = torch.log_softmax(logits.double(), -1)
    for place, record in enumerate(prompt_logprobs(logits, targets, 3)):
        assert record is not None
        assert record.logprob == pytest.approx(float(expected[place, targets[place]]), abs=1e-5)
        assert [token for token, _ in record.top] == expected[place].topk(3).indices.tolist()


def test_a_cleared_row_forgets() -> None:
    table = SamplingTable(1, VOCAB)
    table.add(0, SamplingParams(logprobs=2, allowed_token_ids=(3,), temperature=0.0), 1, 0)
    table.clear(0)
    table.add(0, SamplingParams(temperature=0.0), 1, 0)
    result = Sampler().sample(table, torch.from_numpy(LOGITS[None].copy()), np.array([0]), np.array([0]))
    assert result.token_ids[0] == LOGITS.argmax()
    assert result.logprobs is None


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(logit_bias={VOCAB: 1.0}), "sampling.logit_bias"),
        (SamplingParams(stop_token_ids=(VOCAB,)), "sampling.stop_token_ids"),
        (SamplingParams(allowed_token_ids=(1, VOCAB)), "sampling.allowed_token_ids"),
        (SamplingParams(allowed_token_ids=(0,), min_tokens=1), "sampling.min_tokens"),
        (SamplingParams(bad_words=("x",)), "sampling.bad_words"),
        (SamplingParams(response_format=ResponseFormat(regex="a")), "sampling.response_format"),
        (
            SamplingParams(response_format=ResponseFormat(regex="a"), allowed_token_ids=(1,)),
            "sampling.allowed_token_ids",
        ),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_by_name(params: SamplingParams, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingTable(1, VOCAB, eos_token_ids=[0]).check(params)
    assert refused.value.field == field


def test_bad_words_that_ban_every_allowed_token_are_refused() -> None:
    ids = vocabularies.byte_level().encode("a", add_special=False)
    with pytest.raises(InvalidRequest, match="bans every token"):
        bad_word_table().check(SamplingParams(bad_words=("a",), allowed_token_ids=tuple(ids)))
