"""Collectives among ranks of one host, through memory that they share: microseconds, where sockets take a good part
of a millisecond.

The segment is an anonymous file that has no name to unlink: it is gone with the last rank, however that ends. Each
rank holds a lock on one byte of it, by which the others see within some milliseconds that it is gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from ctypes import byref
from functools import cache
from typing import Any

from torch import Tensor

from penstock_core.kernels import native
from penstock_core.kernels.build import find_library

_LINE_BYTES = 64  # as in ranks.c
_TOKEN_BYTES = 16
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "ranks_all_reduce": (ctypes.c_void_p, ctypes.c_int64),
    "ranks_gather": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    "ranks_broadcast": (ctypes.c_void_p, ctypes.c_int64),
    "ranks_lost": (),
}


class RankLost(RuntimeError):
    """A rank that was waited for has ended, or did not come in time."""


class _Call(ctypes.Structure):
    """As in ranks.c."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("slot_bytes", "spin_ns", "timeout_ns")),
        *((name, ctypes.c_int32) for name in ("fd", "rank", "size")),
        ("step", ctypes.c_uint32),
        ("lost", ctypes.c_int32),
    )


class SharedSegment:
    """One rank's hold on a segment. Every rank makes the same calls in the same order, from one thread.

    Attributes:
        address: by which the other ranks of this host find the segment; to be given to `join`.
    """

    def __init__(self, descriptor: int, address: str, rank: int, size: int, slot_bytes: int) -> None:
        self.address = address
        self.rank = rank
        self.size = size
        self._descriptor = descriptor
        self._functions = _functions()
        self._map = mmap.mmap(descriptor, _total_bytes(size, slot_bytes))
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._call = _Call(base=base, slot_bytes=slot_bytes, fd=descriptor, rank=rank, size=size)
        self.set_patience(timeout_s=None, spin_s=0.0)
        self._lock(fcntl.F_WRLCK)

    @classmethod
    def create(cls, size: int, slot_bytes: int = 2**20) -> SharedSegment:
        """Rank 0: a new segment for `size` ranks, with room for `slot_bytes` of each at a time.

        Raises:
            OSError: the system has no such memory, or no kernels for it.
        """
        _functions()
        slot_bytes = -(-slot_bytes // 4096) * 4096
        descriptor = os.memfd_create("penstock-ranks")
        total = _total_bytes(size, slot_bytes)
        os.ftruncate(descriptor, total + _TOKEN_BYTES)
        token = os.urandom(_TOKEN_BYTES)
        os.pwrite(descriptor, token, total)
        address = f"{os.getpid()}:{descriptor}:{slot_bytes}:{token.hex()}"
        return cls(descriptor, address, 0, size, slot_bytes)

    @classmethod
    def join(cls, address: str, rank: int, size: int) -> SharedSegment:
        """Ranks above 0: the segment that rank 0 made.

        Raises:
            OSError: it is not to be had from here (another host or container, another user, no kernels).
        """
        _functions()
        process, number, slots, token = address.split(":")
        slot_bytes = int(slots)
        descriptor = os.open(f"/proc/{int(process)}/fd/{int(number)}", os.O_RDWR)
        if os.pread(descriptor, _TOKEN_BYTES, _total_bytes(size, slot_bytes)) != bytes.fromhex(token):
            os.close(descriptor)
            raise OSError(f"process {process} is not the one that made the segment")
        return cls(descriptor, address, rank, size, slot_bytes)

    def set_patience(self, *, timeout_s: float | None, spin_s: float) -> None:
        """How long to wait for a rank that lives (None: for ever), and how long of that without sleeping."""
        self._call.timeout_ns = 2**62 if timeout_s is None else int(timeout_s * 1e9)
        self._call.spin_ns = int(spin_s * 1e9)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a contiguous float32 CPU tensor over ranks, in place; all get the same bits."""
        self._run("ranks_all_reduce", tensor.data_ptr(), tensor.numel())

    def gather(self, part: Tensor, out: Tensor | None) -> None:
        """Rank 0: put the ranks' rows [R, n] side by side into `out` [R, size * n]; the others give theirs."""
        rows = part.shape[0]
        row_bytes = part.nbytes // rows if rows else 0
        self._run("ranks_gather", part.data_ptr(), native.pointer(out), rows, row_bytes)

    def broadcast(self, address: int, num_bytes: int) -> None:
        """Copy rank 0's bytes at an address to the others' address."""
        self._run("ranks_broadcast", address, num_bytes)

    def lost(self) -> int | None:
        """A rank that is not there any more."""
        if self._descriptor < 0:
            return None
        rank: int = self._functions["ranks_lost"](byref(self._call))
        return None if rank < 0 else rank

    def close(self) -> None:
        """Let go; the others see it."""
        if self._descriptor >= 0:
            self._lock(fcntl.F_UNLCK)  # the map, which a thread may still be reading, keeps the file open
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self, kind: int) -> None:
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, self.rank, 1, 0))

    def _run(self, name: str, *arguments: object) -> None:
        if self._descriptor < 0:
            raise RankLost("this rank has left the group")
        result: int = self._functions[name](byref(self._call), *arguments)
        if result:
            reason = "did not come in time" if result == 1 else "has ended"
            raise RankLost(f"rank {self._call.lost} of {self.size} {reason}")


def _total_bytes(size: int, slot_bytes: int) -> int:
    head = -(-size * _LINE_BYTES // 4096) * 4096
    return head + 2 * size * slot_bytes


@cache
def _functions() -> dict[str, Any]:
    """The C functions.

    Raises:
        OSError: there is no compiler, or this is not Linux.
    """
    kernels, path = native.kernels(), find_library()
    if kernels is None or path is None:
        raise OSError("the C kernels are not available")
    library = ctypes.CDLL(str(path))
    found = {}
    for name, arguments in _PROTOTYPES.items():
        function = getattr(library, f"{name}_{kernels.instruction_set}", None)
        if function is None:
            raise OSError("the C kernels have no shared memory on this system")
        function.argtypes, function.restype = (ctypes.POINTER(_Call), *arguments), ctypes.c_int32
        found[name] = function
    return found


def available() -> bool:
    """Whether this machine has what a segment needs."""
    try:
        SharedSegment.create(1, 4096).close()
    except (OSError, AttributeError):
        return False
    return True


__all__ = ["RankLost", "SharedSegment", "available"]
