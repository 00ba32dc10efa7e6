"""How a linear layer multiplies: on the C kernels, with weights packed by oneDNN, plainly, or in int8.

`prepare` is called once per linear, when its weight is complete, and returns the product that every step will call. The
weight passed in is the caller's to forget: packing keeps its own copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock_core.kernels import linear
from penstock_core.models.errors import UnsupportedModel

TILE = 64  # rows of one product on a GPU, where bits must not depend on how many there are
Quantization = Literal["int8"]
Product = Callable[[Tensor], Tensor]  # [T, in] -> [T, out]


def stored_dtype(dtype: torch.dtype, device: torch.device, quantization: Quantization | None) -> torch.dtype | None:
    """The dtype to keep a linear's weight in while and after loading; None for the checkpoint's own.

    The C kernels widen 16-bit weights exactly as they multiply, at half the memory traffic of float32.
    """
    as_stored = device.type == "cpu" and (
        quantization == "int8" or (dtype == torch.float32 and linear.reads_stored_weights())
    )
    return None if as_stored else dtype


def prepare(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    deterministic: bool = False,
) -> Product:
    """The fastest product this machine has for activations of `dtype`, a weight [out, in] and a bias [out] or None.

    `deterministic`: one whose bits do not depend on the number of rows, at any cost.

    Raises:
        UnsupportedModel: int8 is asked for where no int8 product exists.
    """
    if quantization == "int8":
        int8 = linear.int8_product(weight, bias)
        return _fbgemm_int8(weight, bias) if int8 is None else _in_float32(int8, dtype)
    if weight.device.type == "cpu":
        product = linear.float_product(weight, bias) if dtype == torch.float32 or deterministic else None
        if product is not None:
            return _in_float32(product, dtype)
        if deterministic:
            return _row_by_row(weight.to(dtype), bias)
        if _can_pack(dtype):
            return _packed(weight.to(dtype), bias)
    weight = weight.to(dtype)
    if deterministic:
        return _in_tiles(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def _in_float32(product: Product, dtype: torch.dtype) -> Product:
    return product if dtype == torch.float32 else lambda x: product(x).to(dtype)


def _row_by_row(weight: Tensor, bias: Tensor | None) -> Product:
    """What is left where no kernel has a fixed order: each row multiplied alone."""
    return lambda x: torch.cat([F.linear(row, weight, bias) for row in torch.split(x, 1)])


def _in_tiles(weight: Tensor, bias: Tensor | None) -> Product:
    """On a GPU: products of one shape only, because the library chooses its order of sums by the number of rows."""

    def product(x: Tensor) -> Tensor:
        rows = x.shape[0]
        tiles = F.pad(x, (0, 0, 0, -rows % TILE)).split(TILE)  # type: ignore[no-untyped-call]
        return torch.cat([F.linear(tile, weight, bias) for tile in tiles])[:rows]

    return product


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linear works here; from 4 rows of 1,000 on it runs up to twice as fast as F.linear."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        _packed(torch.zeros(8, 8, dtype=dtype), None)(torch.zeros(2, 8, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False
    return True


def _packed(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _fbgemm_int8(weight: Tensor, bias: Tensor | None) -> Product:
    """Weights rounded per output channel, activations per token, where there are no C kernels.

    Rows are divided by their own largest magnitude before, and multiplied after, because the library has one activation
    scale for the whole call: an outlier in one request must not cost its neighbours their precision.
    """
    if weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UnsupportedModel(
            f"quantization int8 needs an x86 CPU; this is {weight.device.type}: leave --quantization out"
        )
    scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
    with warnings.catch_warnings():  # the tensors are going away, not the products on them
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(
            weight.float(), scale, torch.zeros_like(scale, dtype=torch.long), axis=0, dtype=torch.qint8
        )
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    # Without VNNI the library adds pairs of products in 16 bits, which 8-bit activations would overflow.
    steps = 127 if torch.cpu._is_vnni_supported() else 63
    zero = 128 if steps == 127 else 64
    bias = None if bias is None else bias.float()

    def product(x: Tensor) -> Tensor:
        rows = x.float()
        largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
        out: Tensor = multiply(rows / largest, 1 / steps, zero, packed) * largest
        if bias is not None:
            out += bias
        return out.to(x.dtype)

    return product
