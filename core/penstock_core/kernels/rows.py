"""Row work between the matrix products: norms, rotary embedding with the write to pages, gated activation.

Each row is treated alone, so results do not depend on the batch. On float32 CPU tensors the C kernels do it in one
pass; the plain PyTorch versions, for every other device and dtype, give the same within rounding.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock_core.attention.batch import LayerPages
from penstock_core.attention.pages import store
from penstock_core.kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), in float32. weight: float32."""
    if (kernels := native.usable(x)) is not None:
        out = torch.empty_like(x)
        size = x.shape[-1]
        kernels.add_rms_norm(
            x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps, torch.get_num_threads()
        )
        return out
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += delta`, and the norm of the sum. Both [T, hidden]."""
    if (kernels := native.usable(residual, delta)) is not None:
        out = torch.empty_like(residual)
        rows, size = residual.shape
        kernels.add_rms_norm(
            residual.data_ptr(),
            delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            size,
            eps,
            torch.get_num_threads(),
        )
        return out
    residual += delta
    return rms_norm(residual, weight, eps)


def gated_activation(gate_up: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
    """`activation(gate) * up` of a merged projection. [T, 2 * I] -> [T, I]."""
    if (kernels := native.usable(gate_up)) is not None:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        gelu = activation == "gelu_tanh"
        kernels.gated_activation(gate_up.data_ptr(), out.data_ptr(), rows, size, gelu, torch.get_num_threads())
        return out
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


@dataclass(slots=True)
class Rotation:
    """Which row of a rotary table each token of a step takes.

    Attributes:
        table: float32 [positions, rotary_dim]: cosines of half the rotated dims, then their sines.
        positions: int64 [T].
    """

    table: Tensor
    positions: Tensor
    _rows: Tensor | None = field(default=None, init=False)

    def rows(self) -> Tensor:
        """float32 [T, rotary_dim], gathered once."""
        if self._rows is None:
            self._rows = self.table.index_select(0, self.positions)
        return self._rows


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How a merged projection is cut: query heads, then key heads, then value heads, each of `dim`."""

    heads: int
    kv_heads: int
    dim: int


def rotate_and_store(
    qkv: Tensor,
    shape: HeadShape,
    rotation: Rotation | None,
    pages: LayerPages,
    slots: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate queries and keys, write keys and values to their page slots, and return the queries.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * dim]; may be changed in place.
        shape: how to cut it.
        rotation: None for a layer without rotary embedding.
        pages: where keys and values go.
        slots: int64 [T], each token's slot.
        norms: float32 weights [dim] of the norm of each query and of each key head, applied first; None for none.
        eps: of the norms.

    Returns:
        Queries [T, heads, dim]; rows may be further apart than heads * dim.
    """
    tokens, dim = qkv.shape[0], shape.dim
    kernels = native.usable(qkv)
    kind = native.stored_type(pages.k.dtype)
    if kernels is not None and kind is not None:
        kernels.rotate_and_store(
            ctypes.byref(
                native.RotateCall(
                    qkv=qkv.data_ptr(),
                    table=None if rotation is None else rotation.table.data_ptr(),
                    positions=slots.data_ptr() if rotation is None else rotation.positions.data_ptr(),
                    slots=slots.data_ptr(),
                    q_norm=None if norms is None else norms[0].data_ptr(),
                    k_norm=None if norms is None else norms[1].data_ptr(),
                    k=pages.k.data_ptr(),
                    v=pages.v.data_ptr(),
                    k_scale=native.pointer(pages.k_scale),
                    v_scale=native.pointer(pages.v_scale),
                    tokens=tokens,
                    heads=shape.heads,
                    kv_heads=shape.kv_heads,
                    dim=dim,
                    rotary_dim=0 if rotation is None else rotation.table.shape[1],
                    kv_type=kind,
                    threads=torch.get_num_threads(),
                    eps=eps,
                )
            )
        )
        return qkv[:, : shape.heads * dim].view(tokens, shape.heads, dim)
    heads = qkv.view(tokens, shape.heads + 2 * shape.kv_heads, dim)
    q, k, v = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], 1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    if rotation is not None:
        q, k = rotate(q, rotation.rows()), rotate(k, rotation.rows())
    store(k, pages.k, pages.k_scale, slots)
    store(v, pages.v, pages.v_scale, slots)
    return q


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary embedding of each head's leading dims. x: [T, H, D]; cos_sin: float32 [T, rotary_dim], cos then sin."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat([rotated, x[..., 2 * half :]], -1)
