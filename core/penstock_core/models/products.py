"""How a linear layer multiplies: plainly, with weights packed by oneDNN, or in int8.

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

from penstock_core.models.errors import UnsupportedModel

Quantization = Literal["int8"]
Product = Callable[[Tensor], Tensor]  # [T, in] -> [T, out]


def prepare(weight: Tensor, bias: Tensor | None, quantization: Quantization | None) -> Product:
    """The fastest product this machine has for a weight [out, in] and an optional bias [out].

    Raises:
        UnsupportedModel: int8 is asked for where no int8 product exists.
    """
    if quantization == "int8":
        return _int8(weight, bias)
    if weight.device.type == "cpu" and _can_pack(weight.dtype):
        return _packed(weight, bias)
    return lambda x: F.linear(x, weight, bias)


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linear works here. Packed, 4 to 16 rows run about twice as fast as F.linear."""
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


def _int8(weight: Tensor, bias: Tensor | None) -> Product:
    """Weights rounded per output channel, activations per token; the sum of products is exact int32.

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
