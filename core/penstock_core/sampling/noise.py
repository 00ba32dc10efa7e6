"""Sampling noise as a pure function of (seed, choice, position, token id): no generator state exists anywhere.

Every function takes numpy arrays or torch tensors (int64 in, float64 out) and uses only wrapping integer arithmetic and
single IEEE-754 operations, `log` included, so the noise has the same bits on every machine and device. Called by the
race (`race.py`) and by the filtered draw; nothing here knows of logits, batches or requests.

The noise of a token is an exponential variate `a`, and the sampled token is the argmax of `score - log(a)`: the Gumbel
trick (`-log(a)` is a standard Gumbel variate). Tokens are grouped in blocks of 64. The least of 64 exponentials is an
exponential of rate 64, falls on each of the 64 with equal chance, and, having no memory, leaves the others at that
least plus a fresh exponential. So one hash gives a block's least noise, which bounds all of its tokens; the race uses
the bound to leave nearly all of them out.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 64
"""Tokens that share one bound. Part of the noise's definition: changing it changes every seeded output."""

_BLOCK_BITS = 6

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Array = TypeVar("Array", npt.NDArray[Any], torch.Tensor)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)  # SplitMix64's increment, the golden ratio
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_SEED_TWEAK = _signed(0xD1B54A32D192ED03)
_BLOCK_COUNTERS = 1 << 40  # counters of blocks, out of reach of token ids


def _mix(x: Array) -> Array:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014; Stafford's variant 13): int64 in, int64 out, a bijection."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    mixed: Array = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return mixed


def stream_key(seed: int, choice: int) -> int:
    """Key of one choice's noise stream; `seed` in [0, 2**63), `choice` >= 0."""
    start, step = np.array([[seed], [choice]], dtype=np.int64)
    return int(_mix(_mix(start + _SEED_TWEAK) + step * _GAMMA)[0])


def position_keys(stream_keys: Array, positions: Array) -> Array:
    """Keys of single draws: int64 stream keys and output positions (0 is the first output token), same shape."""
    return _mix(stream_keys + (positions + 1) * _GAMMA)


def _as_float(bits: Array) -> Array:
    return bits.view(torch.float64) if isinstance(bits, torch.Tensor) else bits.view(np.float64)


def _as_int(floats: Array) -> Array:
    return floats.view(torch.int64) if isinstance(floats, torch.Tensor) else floats.view(np.int64)


def _to_float(integers: Array) -> Array:
    return integers.to(torch.float64) if isinstance(integers, torch.Tensor) else integers.astype(np.float64)


def log(x: Array) -> Array:
    """Natural logarithm of positive normal float64, to about 1e-13; the same bits everywhere, unlike a libm's.

    x = 2**k m with m in [sqrt(1/2), sqrt(2)); log m = 2 artanh((m - 1) / (m + 1)), cut after seven terms.
    """
    bits = _as_int(x)
    k = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = _as_float(bits - (k << 52))
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = z * (2.0 / 13) + 2.0 / 11
    for coefficient in (2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0):
        series = series * z + coefficient
    result: Array = series * s + _to_float(k) * 0.6931471805599453
    return result


def _exponential(hashed: Array) -> Array:
    """Standard exponential variates from the upper 52 bits of int64 hashes."""
    one_to_two = _as_float(((hashed >> 12) & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000)
    return -log(one_to_two - (1.0 - 2.0**-53))  # uniform on (0, 1), never 0 nor 1


def block_minimum(keys: Array, blocks: Array) -> tuple[Array, Array]:
    """Least noise in each block, and which of its 64 tokens has it.

    Args:
        keys: int64 draw keys.
        blocks: int64 block numbers (token id // 64); broadcasts against `keys`.

    Returns:
        (minimum, member): float64 > 0 and int64 in [0, 64), of the broadcast shape.
    """
    hashed = _mix(keys + (blocks + _BLOCK_COUNTERS) * _GAMMA)
    return _exponential(hashed) * (1.0 / BLOCK), hashed & (BLOCK - 1)


def token_noise(keys: Array, token_ids: Array) -> Array:
    """Exponential noise of single tokens: float64 > 0, of the broadcast shape of int64 `keys` and `token_ids`."""
    minimum, member = block_minimum(keys, token_ids >> _BLOCK_BITS)
    return member_noise(keys, token_ids, minimum, member)


def member_noise(keys: Array, token_ids: Array, minimum: Array, member: Array) -> Array:
    """Noise of tokens whose blocks' (minimum, member) are known already; all arguments broadcast."""
    others = (token_ids & (BLOCK - 1)) != member
    noise: Array = minimum + _exponential(_mix(keys + token_ids * _GAMMA)) * others
    return noise
