"""Row work between the matrix products: norms, rotary embedding, gated activation.

Each row is treated alone, so results do not depend on the batch. These are the plain PyTorch versions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), in float32. weight: float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += delta`, and the norm of the sum. Both [T, hidden]."""
    residual += delta
    return rms_norm(residual, weight, eps)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary embedding of each head's leading dims. x: [T, H, D]; cos_sin: float32 [T, rotary_dim], cos then sin."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat([rotated, x[..., 2 * half :]], -1)


def gated_activation(gate_up: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
    """`activation(gate) * up` of a merged projection. [T, 2 * I] -> [T, I]."""
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
