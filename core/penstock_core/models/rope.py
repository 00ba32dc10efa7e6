"""Rotary position embeddings: inverse frequencies of every kind, and the cosine and sine tables made from them.

Su et al., "RoFormer", 2021. Scalings: linear (position interpolation), dynamic (NTK-aware, growing with the position),
llama3 (per-wavelength), yarn (Peng et al., "YaRN", 2023). Angles are computed in float32 as transformers does, so that
the tables agree bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock_core.models.config import RopeConfig


class RopeTable:
    """Cosines and sines by position, grown as contexts grow. One row: [cos of half the dims | sin of half the dims]."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self.config = config
        self._device = device
        self._rows = torch.empty(0, config.rotary_dim)

    def rows(self, max_seq_len: int) -> Tensor:
        """The table for positions 0 .. at least max_seq_len - 1. float32 [>= max_seq_len, rotary_dim]."""
        if self._rows.shape[0] < max_seq_len:
            capacity = max(1024, 1 << (max_seq_len - 1).bit_length())
            self._rows = cos_sin(self.config, capacity).to(self._device)
        return self._rows


def cos_sin(config: RopeConfig, length: int) -> Tensor:
    """Cosines and sines of positions 0 .. length - 1. float32 [length, rotary_dim]."""
    positions = torch.arange(length, dtype=torch.float32)
    if config.kind == "dynamic":
        angles = positions[:, None] * _dynamic_frequencies(config, length)
        attention_factor = 1.0
    else:
        frequencies, attention_factor = inverse_frequencies(config)
        angles = positions[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1) * attention_factor


def inverse_frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [rotary_dim / 2], and the factor on cosines and sines."""
    frequencies = 1.0 / (config.theta ** _exponents(config))
    if config.kind == "linear":
        return frequencies / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(config, frequencies), 1.0
    if config.kind == "yarn":
        return _yarn(config)
    return frequencies, 1.0


def _exponents(config: RopeConfig) -> Tensor:
    return torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim


def _dynamic_frequencies(config: RopeConfig, length: int) -> Tensor:
    """One row of frequencies per position: the ones transformers uses when it generates that token.

    There the base depends on the longest sequence of the call, and cached keys keep the base of their time. Here it
    depends on the token's own position alone, so a prompt means the same whether computed whole, in chunks or in
    company. Up to max_position both are the plain frequencies.
    """
    dim = config.rotary_dim
    reach = torch.arange(1, length + 1).clamp_min(config.max_position).double()
    growth = config.factor * reach / config.max_position - (config.factor - 1)
    base = (config.theta * growth ** (dim / (dim - 2))).float()
    return 1.0 / (base[:, None] ** _exponents(config))


def _llama3(config: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths are interpolated, short ones kept, those between blended."""
    longest = config.original_max_position / config.low_freq_factor
    shortest = config.original_max_position / config.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (config.original_max_position / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    scaled = torch.where(wavelengths > longest, frequencies / config.factor, frequencies)
    blended = (1 - smooth) * scaled / config.factor + smooth * scaled
    between = (wavelengths <= longest) & (wavelengths >= shortest)
    return torch.where(between, blended, scaled)


def _yarn(config: RopeConfig) -> tuple[Tensor, float]:
    """Interpolate the slow dimensions, keep the fast, ramp between; and sharpen attention by the factor's logarithm."""
    dim = config.rotary_dim

    def dimension_of(rotations: float) -> float:
        """The dimension that turns this often over the original context."""
        return (dim * math.log(config.original_max_position / (rotations * 2 * math.pi))) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = config.theta ** _exponents(config)
    frequencies = (1.0 / (config.factor * powers)) * (1 - kept) + (1.0 / powers) * kept

    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    factor = config.attention_factor
    if factor is None:
        both = config.mscale and config.mscale_all_dim
        factor = mscale(config.mscale or 1.0) / mscale(config.mscale_all_dim or 1.0) if both else mscale(1.0)
    return frequencies, factor
