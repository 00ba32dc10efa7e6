"""Memory in huge pages, for what a step reads in full: weights, keys and values.

With pages of 4 KiB a stream of weights waits for their addresses more than for memory, most of all inside a virtual
machine: asked for pages of 2 MiB, one core read them at 28 GB/s instead of 18. Where the system has none, nothing
changes. All begin at a cache line, or every vector of a row would lie in two.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_HUGE = 2 << 20
_CHUNK = 64 << 20  # shared by tensors that alone may not fill a huge page; lives while any of them does
_SMALL = 1 << 16  # below it nothing is gained
_LINE = 64
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only

_lock = threading.Lock()
_rest = torch.empty(0, dtype=torch.uint8)  # of the current chunk


def empty(shape: Sequence[int], dtype: torch.dtype, *, lasting: bool = True) -> Tensor:
    """A tensor of what the memory held, at the start of a cache line.

    `lasting`: it stays about as long as its neighbours, whose chunk it may share; one that is soon replaced would leave
    a hole that nothing fills.
    """
    global _rest
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL:
        return torch.empty(*shape, dtype=dtype)
    if size > _CHUNK // 2 or not lasting:
        raw = _advised(size)
    else:
        with _lock:
            if len(_rest) < size:
                _rest = _advised(_CHUNK)
            raw, _rest = _rest[:size], _rest[-(-size // _LINE) * _LINE :]
    return raw.view(dtype).view(*shape)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, at the start of a cache line, or of a huge page. Memory is committed when first written."""
    size = math.prod(shape) * dtype.itemsize
    edge = _HUGE if size >= _HUGE else _LINE
    raw = torch.from_numpy(np.zeros(size + edge, dtype=np.uint8))  # numpy asks for huge pages
    return raw[-raw.data_ptr() % edge :][:size].view(dtype).view(*shape)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    return empty(tensor.shape, tensor.dtype).copy_(tensor)


def _advised(size: int) -> Tensor:
    """Untouched bytes from the start of a huge page on, to be made of such."""
    raw = torch.empty(size + _HUGE, dtype=torch.uint8)
    raw = raw[-raw.data_ptr() % _HUGE :][:size]
    if _ADVICE is not None:  # a refusal costs only speed
        ctypes.CDLL(None).madvise(ctypes.c_void_p(raw.data_ptr()), ctypes.c_size_t(size), ctypes.c_int(_ADVICE))
    return raw
