"""The sampler against a sorted reference: exact filters, exact draws, and rows that never see each other."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_core.kernels.native import kernels, using
from penstock_core.protocol.requests import SamplingParams
from penstock_core.sampling import NO_TOKEN, Sampler, SamplingTable, dense
from penstock_core.sampling.filters import filter_floors, leading_tokens
from penstock_core.sampling.noise import log, position_keys, stream_key, token_noise
from penstock_core.sampling.race import block_maxima, draw, draw_natively
from tests.unit.sampling.reference import distribution

VOCABULARIES = st.sampled_from([3, 63, 64, 65, 200, 700])


@st.composite
def logits(draw_from: st.DrawFn, rows: int = 1) -> np.ndarray:
    """Smooth or full of equal values, peaked or flat, with impossible tokens."""
    vocab = draw_from(VOCABULARIES)
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32)))
    values = rng.standard_normal((rows, vocab)) * draw_from(st.sampled_from([0.0, 0.3, 2.0, 8.0]))
    step = draw_from(st.sampled_from([0.0, 0.5]))
    if step:
        values = np.round(values / step) * step
    values[rng.random(values.shape) < draw_from(st.sampled_from([0.0, 0.3]))] = -np.inf
    values[np.arange(rows), rng.integers(vocab, size=rows)] = 1.0
    return values.astype(np.float32)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0, 50.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 80, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.3, 0.9, 0.999, 1 - 1e-12]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
)


@given(row=logits(), params=PARAMS.filter(lambda p: p.temperature > 0))
@settings(max_examples=300, deadline=None)
def test_filters_keep_exactly_what_a_sorted_vocabulary_would(row: np.ndarray, params: SamplingParams) -> None:
    blocks, maxima = block_maxima(row)
    floors, cut_off = filter_floors(
        blocks,
        maxima,
        np.array([params.temperature]),
        np.array([params.top_k if params.top_k < row.shape[1] else 0]),
        np.array([params.top_p]),
        np.array([params.min_p]),
    )
    kept = {int(i) for i in np.flatnonzero((row[0] >= floors[0]) & (row[0] > -np.inf))}
    for _, ids in cut_off:
        kept -= set(ids.tolist())
    expected = distribution(row[0].tolist(), params)
    # A cut that falls within rounding of the goal may include or leave one token; nothing else may differ.
    assert len(kept ^ set(expected)) <= (1 if params.top_p < 1.0 and params.min_p == 0.0 else 0) or _near(
        row[0], params, kept ^ set(expected)
    )


def _near(row: np.ndarray, params: SamplingParams, differing: set[int]) -> bool:
    """Whether the tokens in dispute sit on a limit to within float32 rounding."""
    weight = np.exp((row.astype(np.float64) - row.max()) / params.temperature)
    on_min_p = all(abs(weight[i] - params.min_p) <= 1e-5 * params.min_p for i in differing)
    negligible = sum(weight[i] for i in differing) <= 2e-6 * weight.sum() and params.top_p > 0.9999
    return on_min_p or negligible


@given(row=logits(), wanted=st.integers(1, 900))
@settings(max_examples=200, deadline=None)
def test_leading_tokens_are_the_head_of_the_sorted_vocabulary(row: np.ndarray, wanted: int) -> None:
    ids, values = leading_tokens(*block_maxima(row), np.array([wanted]))
    order = np.argsort(-row[0], kind="stable")
    order = order[row[0][order] > -np.inf]
    count = int((values[0] > -np.inf).sum())
    assert count >= min(wanted, len(order))
    assert np.array_equal(ids[0, :count], order[:count])


@given(rows=logits(rows=5), temperature=st.sampled_from([0.01, 0.7, 1.0, 10.0]), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_the_race_finds_the_best_of_the_whole_vocabulary(rows: np.ndarray, temperature: float, seed: int) -> None:
    keys = position_keys(np.array([stream_key(seed, 0)]), np.arange(5))
    heat = np.full(5, temperature)
    tokens, scores = draw(*block_maxima(rows), heat, keys)
    every = rows / heat[:, None] - log(token_noise(keys[:, None], np.arange(rows.shape[1])))
    assert np.array_equal(tokens, every.argmax(-1))
    assert np.array_equal(scores, every.max(-1))
    native = kernels()
    if native is not None:
        assert np.array_equal(draw_natively(native, rows, heat, keys), tokens)


@given(rows=logits(rows=6), params=st.lists(PARAMS, min_size=6, max_size=6), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_a_row_alone_in_a_batch_or_on_an_accelerator_gets_the_same_token(
    rows: np.ndarray, params: list[SamplingParams], seed: int
) -> None:
    table = SamplingTable(8, rows.shape[1])
    for row, options in enumerate(params):
        table.add(row, options, seed, row)
    places, positions = np.arange(6), np.arange(6) * 3
    together = Sampler().sample(table, torch.from_numpy(rows.copy()), places, positions).token_ids
    with using(None):
        portable = Sampler().sample(table, torch.from_numpy(rows.copy()), places, positions).token_ids
    assert np.array_equal(portable, together)
    for row in places:
        one = slice(row, row + 1)
        alone = Sampler().sample(table, torch.from_numpy(rows[one].copy()), places[one], positions[one]).token_ids
        assert alone[0] == together[row]
        if params[row].temperature == 0.0:
            assert together[row] == rows[row].argmax()
        else:
            assert together[row] != NO_TOKEN
            assert rows[row, together[row]] > -np.inf
    if all(p.top_p < 0.9999 for p in params):  # beyond, a token of negligible weight may sit on either side of the cut
        elsewhere = dense.choose(table, torch.from_numpy(rows.copy()), places, positions).numpy()
        assert np.array_equal(elsewhere, together)
