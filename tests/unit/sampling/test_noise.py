"""The noise is uniform, independent, and has the same bits everywhere and for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock_core.sampling.noise import BLOCK, block_minimum, log, position_keys, stream_key, token_noise
from tests.unit.sampling.reference import chi_squared_p_value

COUNT = 1 << 17
GOLDEN_KEY = -7408890482333706102
GOLDEN_NOISE = [0.6681093953808216, 1.188018704671133, 0.4071234800249483, 0.7208639072508958, 1.0692436272562884]


def keys(seed: int = 1, choice: int = 0, positions: int | np.ndarray = 0) -> np.ndarray:
    return position_keys(np.array([stream_key(seed, choice)]), np.atleast_1d(np.asarray(positions, dtype=np.int64)))


STREAMS = {
    "tokens": token_noise(keys(), np.arange(COUNT)),
    "tokens of a large seed": token_noise(keys(2**63 - 1, 63, 10**6), np.arange(COUNT)),
    "positions": token_noise(keys(positions=np.arange(COUNT)), np.array([7])),
    "choices": np.concatenate([token_noise(keys(choice=c), np.arange(256)) for c in range(64)]),
    "seeds": np.concatenate([token_noise(keys(seed), np.arange(64)) for seed in range(1024)]),
    "blocks": block_minimum(keys(), np.arange(COUNT))[0] * BLOCK,
}


@pytest.mark.parametrize("name", STREAMS)
def test_noise_is_exponential(name: str) -> None:
    noise = STREAMS[name]
    bins = np.floor(-np.expm1(-noise) * 256).astype(int)  # uniform if the noise is exponential
    assert chi_squared_p_value(np.bincount(bins, minlength=256), np.full(256, 1 / 256)) > 1e-4
    assert noise.min() > 0.0


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("lag", [1, 2, 63, 64, 65, 512])
def test_neighbours_are_uncorrelated(name: str, lag: int) -> None:
    uniform = -np.expm1(-STREAMS[name])
    correlation = np.corrcoef(uniform[:-lag], uniform[lag:])[0, 1]
    assert abs(correlation) < 4.5 / np.sqrt(len(uniform))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (keys(1), keys(2)),
        (keys(1, 0), keys(1, 1)),
        (keys(1, 0, 0), keys(1, 0, 1)),
        (keys(1, 0, 1), keys(1, 1, 0)),
        (keys(0, 0, 0), keys(2**62, 0, 0)),
    ],
)
def test_streams_of_different_draws_are_independent(first: np.ndarray, second: np.ndarray) -> None:
    tokens = np.arange(COUNT)
    x, y = (np.floor(-np.expm1(-token_noise(key, tokens)) * 16).astype(int) for key in (first, second))
    assert chi_squared_p_value(np.bincount(x * 16 + y, minlength=256), np.full(256, 1 / 256)) > 1e-4


def test_a_block_s_minimum_is_the_least_noise_of_its_tokens() -> None:
    noise = token_noise(keys(5), np.arange(100 * BLOCK)).reshape(100, BLOCK)
    minimum, member = block_minimum(keys(5), np.arange(100))
    assert np.array_equal(noise.min(-1), minimum)
    assert np.array_equal(noise.argmin(-1), member)
    members = block_minimum(keys(5), np.arange(COUNT))[1]
    assert chi_squared_p_value(np.bincount(members, minlength=BLOCK), np.full(BLOCK, 1 / BLOCK)) > 1e-4


def test_tokens_of_one_block_are_independent() -> None:
    """The block's least noise is shared by construction; the tokens' noise must not show it."""
    noise = token_noise(keys(positions=np.arange(20_000))[:, None], np.arange(3, 6))
    uniform = np.floor(-np.expm1(-noise) * 8).astype(int)
    cells = uniform @ np.array([64, 8, 1])
    assert chi_squared_p_value(np.bincount(cells, minlength=512), np.full(512, 1 / 512)) > 1e-4


def test_numpy_and_torch_compute_the_same_bits() -> None:
    draws, tokens = keys(positions=np.arange(64))[:, None], np.arange(4096)
    there = token_noise(torch.from_numpy(draws), torch.from_numpy(tokens))
    assert np.array_equal(token_noise(draws, tokens), there.numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_accelerator_computes_the_same_bits() -> None:
    draws, tokens = keys(positions=np.arange(64))[:, None], np.arange(4096)
    there = token_noise(torch.from_numpy(draws).cuda(), torch.from_numpy(tokens).cuda())
    assert np.array_equal(token_noise(draws, tokens), there.cpu().numpy())


def test_log_is_the_logarithm() -> None:
    x = np.concatenate([np.random.default_rng(0).random(10_000), np.logspace(-300, 300, 1001), [1.0, 0.5, 2.0]])
    assert np.allclose(log(x), np.log(x), rtol=1e-12, atol=1e-12)
    assert log(np.array([1.0]))[0] == 0.0


def test_noise_never_changes_between_versions() -> None:
    """Jobs resume on other workers, perhaps of another version: these values are part of the protocol."""
    assert stream_key(42, 1) == GOLDEN_KEY
    assert token_noise(keys(42, 1, 3), np.array([0, 1, 63, 64, 151_935])).tolist() == GOLDEN_NOISE
