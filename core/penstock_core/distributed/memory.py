"""How much memory a device has left, and whether a checkpoint's weights fit into it.

Looks at the machine and at file headers only; loads nothing.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import psutil
import torch

from penstock_core.models.config import ModelConfig
from penstock_core.models.loading import choose_dtype
from penstock_core.protocol.errors import InvalidConfiguration

_CGROUP = Path("/sys/fs/cgroup")
_MIB = 2**20


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that a new allocation on `device` may use; in a container, within its limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return available
    return min(available, max(0, limit - used))


def weight_elements(folder: Path) -> int:
    """Number of weights in a checkpoint's safetensors files, from their headers."""
    elements = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for size in tensor["shape"]:
                    count *= size
                elements += count
    return elements


def check_weights_fit(
    folder: Path, config: ModelConfig, device: torch.device, dtype: str, quantization: str | None
) -> None:
    """Raise InvalidConfiguration if the weights exceed the device's free memory, with what would fit."""
    elements, free = weight_elements(folder), free_memory_bytes(device)
    width = 1 if quantization == "int8" else choose_dtype(dtype, config, device).itemsize
    if elements * width <= free:
        return
    smaller = [
        f"{name} needs {elements * size / _MIB:.0f} MiB"
        for name, size in (("dtype bfloat16", 2), ("quantization int8", 1))
        if size < width and elements * size <= free
    ]
    remedy = "; ".join(smaller) or "no supported precision fits; use a smaller model or a larger device"
    raise InvalidConfiguration(
        "model",
        f"{folder.name} needs {elements * width / _MIB:.0f} MiB for its weights, and {device} has "
        f"{free / _MIB:.0f} MiB free; {remedy}",
    )
