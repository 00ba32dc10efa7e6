"""The C kernels, found or built once per process, and called through ctypes on data pointers.

`kernels()` is None where there is no compiler, or inside `using(None)`; every caller then takes its plain PyTorch path.
torch is imported first, so that the library shares its OpenMP threads.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from penstock_core.kernels.build import BuildFailed, build, cache_folder, find_library

log = logging.getLogger(__name__)

_NAMES = ("portable", "avx2", "avx512")
INT8 = 3
_STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: INT8}
MAX_HEAD_DIM = 512  # as in attention_tiles.h

_pointer, _i64, _i32, _f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class AttentionCall(ctypes.Structure):
    """As in attention_tiles.h."""

    _fields_ = (
        *((name, _pointer) for name in ("q", "out", "k", "v", "k_scale", "v_scale")),
        *((name, _pointer) for name in ("block_table", "query_start", "seq_lens")),
        *((name, _i64) for name in ("q_stride", "table_stride")),
        *((name, _i32) for name in ("sequences", "heads", "kv_heads", "dim", "page_size", "window", "kv_type")),
        ("threads", _i32),
        *((name, _f32) for name in ("scale", "softcap")),
    )


class RotateCall(ctypes.Structure):
    """As in rows.c."""

    _fields_ = (
        *((name, _pointer) for name in ("qkv", "table", "positions", "slots", "q_norm", "k_norm")),
        *((name, _pointer) for name in ("k", "v", "k_scale", "v_scale")),
        ("tokens", _i64),
        *((name, _i32) for name in ("heads", "kv_heads", "dim", "rotary_dim", "kv_type", "threads")),
        ("eps", _f32),
    )


class LinearCall(ctypes.Structure):
    """As in linear.c."""

    _fields_ = (
        *((name, _pointer) for name in ("w", "bias", "x", "out", "scratch")),
        *((name, _i64) for name in ("m", "n", "k", "x_stride")),
        *((name, _i32) for name in ("w_type", "threads")),
    )


class Int8LinearCall(ctypes.Structure):
    """As in linear_int8.c."""

    _fields_ = (
        *((name, _pointer) for name in ("w", "w_scale", "bias", "x", "out", "rounded", "x_scale", "x_sum")),
        *((name, _i64) for name in ("m", "n", "k", "x_stride")),
        ("threads", _i32),
    )


class Matrix(ctypes.Structure):
    """As in decoder.c: a packed weight."""

    _fields_ = (
        *((name, _pointer) for name in ("w", "w_scale", "bias")),
        *((name, _i64) for name in ("n", "k", "type")),
    )


class Layer(ctypes.Structure):
    """As in decoder.c."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        *((name, _pointer) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")),
        *((name, _pointer) for name in ("q_norm", "k_norm", "rope", "k", "v", "k_scale", "v_scale")),
        *((name, _i32) for name in ("rotary_dim", "window", "kv_type", "norm_projections")),
    )


class Decoder(ctypes.Structure):
    """As in decoder.c."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("head", Matrix),
        *((name, _pointer) for name in ("embedding", "norm")),
        *((name, _i64) for name in ("vocab", "num_layers", "hidden", "heads", "kv_heads", "dim", "intermediate")),
        ("page_size", _i64),
        *((name, _i32) for name in ("gelu", "embedding_type")),
        *((name, _f32) for name in ("embed_scale", "eps", "scale", "softcap")),
    )


class DecodeCall(ctypes.Structure):
    """As in decoder.c."""

    _fields_ = (
        ("decoder", ctypes.POINTER(Decoder)),
        *((name, _pointer) for name in ("token_ids", "positions", "slots", "block_table", "query_start", "seq_lens")),
        *((name, _pointer) for name in ("out", "scratch")),
        *((name, _i64) for name in ("tokens", "sequences", "table_stride")),
        ("threads", _i32),
    )


class DraftCall(ctypes.Structure):
    """As in draft.c."""

    _fields_ = (
        ("decoder", ctypes.POINTER(Decoder)),
        *((name, _pointer) for name in ("sequences", "temperature", "block_table", "rates", "edges")),
        *((name, _pointer) for name in ("out", "integers", "floats", "doubles")),
        ("floor", ctypes.c_double),
        *((name, _i64) for name in ("n", "tokens", "depth", "table_stride", "table_width", "num_edges")),
        ("threads", _i32),
    )


class DrawCall(ctypes.Structure):
    """As in draw.c."""

    _fields_ = (
        *((name, _pointer) for name in ("logits", "temperature", "keys", "floors", "scratch", "tokens")),
        *((name, _i64) for name in ("rows", "vocab")),
        ("threads", _i32),
    )


class Kernels:
    """The functions of one instruction set."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set

        def bind(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
            function = getattr(library, f"{name}_{instruction_set}")
            function.argtypes, function.restype = arguments, result
            return function  # type: ignore[no-any-return]

        self.paged_attention = bind("paged_attention", ctypes.POINTER(AttentionCall))
        self.rotate_and_store = bind("rotate_and_store", ctypes.POINTER(RotateCall))
        self.linear = bind("linear", ctypes.POINTER(LinearCall))
        self.linear_int8 = None  # needs VNNI
        if instruction_set == "avx512":
            self.linear_int8 = bind("linear_int8", ctypes.POINTER(Int8LinearCall))
        self.draw = bind("draw", ctypes.POINTER(DrawCall))
        self.decode = bind("decode", ctypes.POINTER(DecodeCall), result=ctypes.c_int)
        self.draft = bind("draft", ctypes.POINTER(DraftCall), result=ctypes.c_int)
        self.decoder_scratch = bind("decoder_scratch", ctypes.POINTER(Decoder), result=_i64)
        self.add_rms_norm = bind("add_rms_norm", _pointer, _pointer, _pointer, _pointer, _i64, _i64, _f32, ctypes.c_int)
        self.gated_activation = bind("gated_activation", _pointer, _pointer, _i64, _i64, ctypes.c_int, ctypes.c_int)


_chosen: list[Kernels | None] = []


def kernels() -> Kernels | None:
    """The kernels of this machine's best instruction set, or None."""
    return _chosen[-1] if _chosen else _load()


@contextmanager
def using(chosen: Kernels | None) -> Iterator[None]:
    """Take these kernels, or none, in this process for a while. A linear keeps those it was loaded with."""
    _chosen.append(chosen)
    try:
        yield
    finally:
        _chosen.pop()


def available(path: str) -> list[Kernels]:
    """The kernels of a library for every instruction set that this machine has, the best last."""
    library = ctypes.CDLL(path)
    return [Kernels(library, name) for name in _NAMES[: library.penstock_instruction_set() + 1]]


@cache
def _load() -> Kernels | None:
    try:
        path = find_library() or build(cache_folder())
        return available(str(path))[-1]
    except (BuildFailed, OSError) as error:
        log.warning("C kernels are not available, plain PyTorch is used: %s", error)
        return None


def stored_type(dtype: torch.dtype) -> int | None:
    """The kernels' number for a storage dtype, or None for one they do not read."""
    return _STORED.get(dtype)


def pointer(tensor: Tensor | None) -> int | None:
    """A tensor's address; None is C's null."""
    return None if tensor is None else tensor.data_ptr()


def usable(*tensors: Tensor) -> Kernels | None:
    """The kernels, if all these are contiguous float32 tensors on the CPU."""
    found = kernels()
    if found is None:
        return None
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
    return found
