"""Linear layers on the C kernels: weights packed once, then products whose bits do not depend on the batch.

Float weights stay as they are stored, in 32 or 16 bits, and are widened exactly; int8 weights are rounded per output
and multiplied with activations rounded per token. None is returned where this machine's kernels cannot do it.
"""

from __future__ import annotations

from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock_core.kernels import memory, native

PANEL = 32  # outputs that lie together, as in linear.c


class FloatProduct:
    """A product with a CPU weight [out, in] of float32, float16 or bfloat16. float32 [T, in] -> float32 [T, out]."""

    __slots__ = ("_bias", "_packed", "in_features", "kernel", "matrix", "out_features")

    def __init__(self, kernels: native.Kernels, weight: Tensor, bias: Tensor | None, w_type: int) -> None:
        self.kernel = kernels.linear
        self.out_features, self.in_features = weight.shape
        missing = -self.out_features % PANEL
        padded = F.pad(weight, (0, 0, 0, missing)) if missing else weight
        self._packed = memory.copied(padded.view(-1, PANEL, self.in_features).transpose(1, 2))
        self._bias = None if bias is None else bias.float()
        self.matrix = native.Matrix(
            self._packed.data_ptr(), None, native.pointer(self._bias), self.out_features, self.in_features, w_type
        )

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [T, in] -> float32 [T, out]."""
        x = _rows(x)
        rows, matrix = x.shape[0], self.matrix
        out = torch.empty(rows, self.out_features)
        scratch = torch.empty(rows * self.in_features) if rows > 1 else out
        self.kernel(
            byref(
                native.LinearCall(
                    matrix.w,
                    matrix.bias,
                    x.data_ptr(),
                    out.data_ptr(),
                    scratch.data_ptr(),
                    rows,
                    self.out_features,
                    self.in_features,
                    x.stride(0),
                    matrix.type,
                    torch.get_num_threads(),
                )
            )
        )
        return out


class Int8Product:
    """A product with a CPU weight [out, in] in 8 bits, one scale per output. float32 [T, in] -> float32 [T, out]."""

    __slots__ = ("_bias", "_packed", "_scale", "in_features", "kernel", "matrix", "out_features")

    def __init__(self, kernels: native.Kernels, weight: Tensor, bias: Tensor | None) -> None:
        assert kernels.linear_int8 is not None
        self.kernel = kernels.linear_int8
        self.out_features, self.in_features = weight.shape
        self._scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        fours = -(-self.in_features // 4)
        rounded = ((weight.float() / self._scale[:, None]).round_() + 128).to(torch.uint8)
        rounded = F.pad(rounded, (0, fours * 4 - self.in_features, 0, -self.out_features % PANEL))
        self._packed = memory.copied(rounded.view(-1, PANEL, fours, 4).transpose(1, 2))
        self._bias = None if bias is None else bias.float()
        self.matrix = native.Matrix(
            self._packed.data_ptr(),
            self._scale.data_ptr(),
            native.pointer(self._bias),
            self.out_features,
            self.in_features,
            native.INT8,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [T, in] -> float32 [T, out]."""
        x = _rows(x)
        rows, matrix = x.shape[0], self.matrix
        fours = -(-self.in_features // 4)
        out = torch.empty(rows, self.out_features)
        # One allocation: the rounded rows, then each row's scale and sum.
        scratch = torch.empty(rows * (fours + 2), dtype=torch.int32)
        at = scratch.data_ptr()
        scales = at + rows * fours * 4
        self.kernel(
            byref(
                native.Int8LinearCall(
                    matrix.w,
                    matrix.w_scale,
                    matrix.bias,
                    x.data_ptr(),
                    out.data_ptr(),
                    at,
                    scales,
                    scales + rows * 4,
                    rows,
                    self.out_features,
                    self.in_features,
                    x.stride(0),
                    torch.get_num_threads(),
                )
            )
        )
        return out


def reads_stored_weights() -> bool:
    """Whether float products take weights in the dtype they are stored in. Plain C is no faster than the libraries."""
    kernels = native.kernels()
    return kernels is not None and kernels.instruction_set != "portable"


def float_product(weight: Tensor, bias: Tensor | None) -> FloatProduct | None:
    """A product for a CPU weight [out, in] of float32, float16 or bfloat16."""
    kernels = native.kernels()
    w_type = native.stored_type(weight.dtype)
    if kernels is None or not reads_stored_weights() or weight.device.type != "cpu" or w_type is None:
        return None
    return FloatProduct(kernels, weight, bias, w_type)


def int8_product(weight: Tensor, bias: Tensor | None) -> Int8Product | None:
    """A product for a CPU weight [out, in], rounded to 8 bits with one scale per output."""
    kernels = native.kernels()
    if kernels is None or kernels.linear_int8 is None or weight.device.type != "cpu":
        return None
    return Int8Product(kernels, weight, bias)


def _rows(x: Tensor) -> Tensor:
    """float32 rows, each contiguous."""
    if x.dtype != torch.float32:
        x = x.float()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
