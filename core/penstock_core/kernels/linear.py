"""Linear layers on the C kernels: weights packed once, then products whose bits do not depend on the batch.

Float weights stay as they are stored, in 32 or 16 bits, and are widened exactly; int8 weights are rounded per output
and multiplied with activations rounded per token. None is returned where this machine's kernels cannot do it.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock_core.kernels import native

PANEL = 32  # outputs that lie together, as in linear.c
Product = Callable[[Tensor], Tensor]  # float32 [T, in] -> float32 [T, out]


def reads_stored_weights() -> bool:
    """Whether float products take weights in the dtype they are stored in. Plain C is no faster than the libraries."""
    kernels = native.kernels()
    return kernels is not None and kernels.instruction_set != "portable"


def float_product(weight: Tensor, bias: Tensor | None) -> Product | None:
    """A product for a CPU weight [out, in] of float32, float16 or bfloat16."""
    kernels = native.kernels()
    w_type = native.stored_type(weight.dtype)
    if kernels is None or not reads_stored_weights() or weight.device.type != "cpu" or w_type is None:
        return None
    out_features, in_features = weight.shape
    padded = F.pad(weight, (0, 0, 0, -out_features % PANEL)) if out_features % PANEL else weight
    packed = padded.view(-1, PANEL, in_features).transpose(1, 2).contiguous()
    bias = None if bias is None else bias.float()
    multiply, call_type = kernels.linear, native.LinearCall
    w, b = packed.data_ptr(), native.pointer(bias)

    def product(x: Tensor) -> Tensor:
        x = _rows(x)
        rows = x.shape[0]
        out = torch.empty(rows, out_features)
        scratch = torch.empty(rows * in_features) if rows > 1 else out
        threads = torch.get_num_threads()
        multiply(
            byref(
                call_type(
                    w,
                    b,
                    x.data_ptr(),
                    out.data_ptr(),
                    scratch.data_ptr(),
                    rows,
                    out_features,
                    in_features,
                    x.stride(0),
                    w_type,
                    threads,
                )
            )
        )
        return out

    product.kept = packed, bias  # type: ignore[attr-defined]  # their addresses are in use
    return product


def int8_product(weight: Tensor, bias: Tensor | None) -> Product | None:
    """A product for a CPU weight [out, in], rounded to 8 bits with one scale per output."""
    kernels = native.kernels()
    if kernels is None or kernels.linear_int8 is None or weight.device.type != "cpu":
        return None
    out_features, in_features = weight.shape
    scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
    fours = -(-in_features // 4)
    rounded = ((weight.float() / scale[:, None]).round_() + 128).to(torch.uint8)
    rounded = F.pad(rounded, (0, fours * 4 - in_features, 0, -out_features % PANEL))
    packed = rounded.view(-1, PANEL, fours, 4).transpose(1, 2).contiguous()
    bias = None if bias is None else bias.float()
    multiply, call_type = kernels.linear_int8, native.Int8LinearCall
    w, s, b = packed.data_ptr(), scale.data_ptr(), native.pointer(bias)

    def product(x: Tensor) -> Tensor:
        x = _rows(x)
        rows = x.shape[0]
        out = torch.empty(rows, out_features)
        # One allocation: the rounded rows, then each row's scale and sum.
        scratch = torch.empty(rows * (fours + 2), dtype=torch.int32)
        at = scratch.data_ptr()
        scales = at + rows * fours * 4
        threads = torch.get_num_threads()
        multiply(
            byref(
                call_type(
                    w,
                    s,
                    b,
                    x.data_ptr(),
                    out.data_ptr(),
                    at,
                    scales,
                    scales + rows * 4,
                    rows,
                    out_features,
                    in_features,
                    x.stride(0),
                    threads,
                )
            )
        )
        return out

    product.kept = packed, scale, bias  # type: ignore[attr-defined]  # their addresses are in use
    return product


def _rows(x: Tensor) -> Tensor:
    """float32 rows, each contiguous."""
    if x.dtype != torch.float32:
        x = x.float()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
