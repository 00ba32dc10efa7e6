"""Streaming a safetensors checkpoint into a model, tensor by tensor, each straight to its place.

Layers say what they expect while they are built (`WeightPlan.expect`); `WeightPlan.load` then walks the files in
order and copies each rank's slices. A weight is handed to its layer the moment it is complete, to be packed or
quantised, so at no time do two copies of the model exist. Pickle files are never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock_core.models.errors import BrokenCheckpoint

Index = tuple[int | slice, ...]
Progress = Callable[[int, int], None]  # bytes loaded, bytes in all

WHOLE = slice(None)


class Weight:
    """One parameter of the model, filled piece by piece and handed over when full.

    `dtype` None keeps the checkpoint's own; pieces stored differently meet in float32, which holds them all.
    """

    __slots__ = ("_device", "_dtype", "_missing", "_on_full", "_shape", "_tensor")

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device, on_full: Callable[[Tensor], None]
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._on_full = on_full
        self._missing = math.prod(shape)
        self._tensor: Tensor | None = None

    def place(self, index: Index, data: Tensor) -> None:
        """Copy a piece to its place, converting its dtype; on the last piece give the tensor away."""
        if self._tensor is None:
            self._tensor = torch.empty(self._shape, dtype=self._dtype or data.dtype, device=self._device)
        elif self._dtype is None and data.dtype != self._tensor.dtype:
            self._tensor = self._tensor.float()
        self._tensor[index].copy_(data)
        self._missing -= data.numel()
        if self._missing == 0:
            tensor, self._tensor = self._tensor, None
            self._on_full(tensor)


@dataclass(frozen=True, slots=True)
class Piece:
    """Which part of a file's tensor goes to which part of a weight."""

    source: Index
    weight: Weight
    target: Index


@dataclass(slots=True)
class _Expected:
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)


class WeightPlan:
    """Everything a model expects of a checkpoint, and the files it will come from."""

    def __init__(self, folder: Path) -> None:
        self._files = _tensor_files(folder)
        self._expected: dict[str, _Expected] = {}
        self._ignored: list[str] = []
        self._elsewhere: list[str] = []

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of this name."""
        return name in self._files

    def expect(self, name: str, shape: tuple[int, ...], *pieces: Piece) -> None:
        """A tensor that must be there in this shape; a rank that needs none of it gives no pieces."""
        self._expected.setdefault(name, _Expected(shape)).pieces.extend(pieces)

    def elsewhere(self, prefix: str) -> None:
        """Tensors beginning so belong to other ranks, which check them."""
        self._elsewhere.append(prefix)

    def ignore(self, suffix: str) -> None:
        """Tensors ending so may be there and are not needed."""
        self._ignored.append(suffix)

    def load(self, progress: Progress | None = None) -> None:
        """Copy every expected tensor.

        Raises:
            BrokenCheckpoint: a tensor is missing, unexpected or of another shape, or a file is damaged.
        """
        self._check_names()
        by_file: dict[Path, list[str]] = {}
        for name, path in self._files.items():
            by_file.setdefault(path, []).append(name)
        total = sum(path.stat().st_size for path in by_file)
        done = 0
        for path, names in by_file.items():
            with _opened(path) as file:
                for name in names:
                    expected = self._expected.get(name)
                    if expected is not None:
                        done_bytes = self._load_tensor(file, path, name, expected)
                        if progress is not None:
                            progress(min(total, done + done_bytes), total)
                        done += done_bytes
        if progress is not None:
            progress(total, total)

    def _load_tensor(self, file: Any, path: Path, name: str, expected: _Expected) -> int:
        stored = file.get_slice(name)
        shape = tuple(stored.get_shape())
        if shape != expected.shape:
            raise BrokenCheckpoint(
                f"{path}: tensor {name} is {list(shape)}, config.json implies {list(expected.shape)}"
            )
        if stored.get_dtype() not in _FLOATS:
            raise BrokenCheckpoint(
                f"{path}: tensor {name} is {stored.get_dtype()}, expected one of {', '.join(_FLOATS)}; "
                "use the unquantised checkpoint, and --quantization int8"
            )
        size = 0
        for piece in expected.pieces:
            data = stored[piece.source]
            piece.weight.place(piece.target, data)
            size += data.numel() * data.element_size()
        return size

    def _check_names(self) -> None:
        missing = [name for name in self._expected if name not in self._files]
        if missing:
            raise BrokenCheckpoint(
                f"the checkpoint lacks {len(missing)} tensors that config.json implies, first {missing[0]}; "
                f"looked in {_list_files(self._files)}"
            )
        for name, path in self._files.items():
            known = name in self._expected or name.startswith(tuple(self._elsewhere))
            if not known and not name.endswith(tuple(self._ignored)):
                raise BrokenCheckpoint(f"{path}: tensor {name} has no place in the model that config.json describes")


_FLOATS = ("F32", "BF16", "F16")


def _list_files(files: dict[str, Path]) -> str:
    names = sorted({path.name for path in files.values()})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def stored_tensors(folder: Path) -> Iterator[tuple[tuple[int, ...], str]]:
    """Shape and dtype (`F32`, `BF16`, ...) of every tensor of a checkpoint, from the files' headers.

    Raises:
        BrokenCheckpoint: files are missing or damaged.
    """
    files = _tensor_files(folder)
    for path in dict.fromkeys(files.values()):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_slice(name)
                yield tuple(tensor.get_shape()), str(tensor.get_dtype())


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Every tensor's file, in the order in which they lie on disk."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise BrokenCheckpoint(f"{index}: not a safetensors index (no weight_map)") from None
        paths = [folder / name for name in sorted(shards)]
        for path in paths:
            if path.parent != folder:
                raise BrokenCheckpoint(f"{index}: weight_map points outside the checkpoint folder, at {path}")
            if not path.exists():
                raise BrokenCheckpoint(f"{path}: no such file, though {index.name} names it; download it again")
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise BrokenCheckpoint(
                f"{pickles[0]}: pickle checkpoints can run code and are refused; convert it with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), which writes safetensors"
            )
        raise BrokenCheckpoint(f"{folder}: no *.safetensors file")
    files: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.offset_keys():
                if name in files:
                    raise BrokenCheckpoint(f"{path}: tensor {name} is also in {files[name].name}")
                files[name] = path
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BrokenCheckpoint(f"{path}: damaged or incomplete ({error}); download it again") from error
