"""The memory manager: what a rank's weights, activations and pages take, and whether that fits.

Before loading it looks at the machine and at file headers only. After loading it knows what the weights took; a GPU's
activations are measured by running the largest step once, a CPU's are estimated, generously, from the shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from penstock_core.cache import PageConfig, PageShape, least_pages, most_pages
from penstock_core.models.config import ModelConfig
from penstock_core.models.loading import choose_dtype
from penstock_core.models.products import Quantization
from penstock_core.models.products import stored_dtype as stored_weight_dtype
from penstock_core.models.weights import stored_tensors
from penstock_core.protocol.errors import InvalidConfiguration

_CGROUP = Path("/sys/fs/cgroup")
_MIB = 2**20
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What one rank's memory is used for, in bytes.

    Attributes:
        free: what was free for this rank before it loaded anything. budget: the share of it that it may use.
        weights: measured while they were loaded. activations: of the largest step; measured on CUDA, else estimated.
        pages: the pool of keys and values. host_pages: beside it, in host memory.
    """

    rank: int
    free: int
    budget: int
    weights: int
    activations: int
    pages: int
    host_pages: int

    def __str__(self) -> str:
        parts = (
            f"{name} {getattr(self, field) / _MIB:,.0f}"
            for name, field in (
                ("weights", "weights"),
                ("activations", "activations"),
                ("pages", "pages"),
                ("host pages", "host_pages"),
                ("budget", "budget"),
                ("free before", "free"),
            )
        )
        return f"rank {self.rank}, MiB: {', '.join(parts)}"


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


def taken_memory_bytes(device: torch.device) -> int:
    """Bytes that this process holds on `device`: what PyTorch allocated there, or the process's own memory."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):  # without files that are only mapped
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def weight_bytes(folder: Path, width: int | None) -> int:
    """Bytes of a checkpoint's weights at `width` bytes each, or as they are stored, from the files' headers.

    Raises:
        BrokenCheckpoint: files are missing or damaged.
    """
    return sum(math.prod(shape) * (width or _WIDTHS.get(dtype, 4)) for shape, dtype in stored_tensors(folder))


def needed_weight_bytes(
    folder: Path, config: ModelConfig, device: torch.device, dtype: str, quantization: Quantization | None
) -> int:
    """Bytes that all weights take once they are loaded, over all ranks."""
    if quantization == "int8":
        return weight_bytes(folder, 1)
    compute = choose_dtype(dtype, config, device)
    stored = stored_weight_dtype(compute, device, quantization)
    return weight_bytes(folder, None if stored is None else compute.itemsize)


def check_weights_fit(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: str,
    quantization: Quantization | None,
    *,
    ranks: int = 1,
    ranks_here: int = 1,
) -> int:
    """Raise InvalidConfiguration if the weights exceed the device's free memory, with what would fit.

    Args:
        folder, config: the checkpoint. device, dtype, quantization: how it is to be loaded.
        ranks: that share the weights. ranks_here: of them, on this device.

    Returns:
        Bytes of one rank's weights.
    """
    free = free_memory_bytes(device)
    needed = needed_weight_bytes(folder, config, device, dtype, quantization)
    here = needed * ranks_here // ranks
    if here <= free:
        return needed // ranks
    smaller = []
    if quantization is None:
        two, one = weight_bytes(folder, 2), weight_bytes(folder, 1)
        for name, size in (("dtype bfloat16", two), ("quantization int8", one)):
            if size < needed and size * ranks_here // ranks <= free:
                smaller.append(f"{name} needs {size * ranks_here / ranks / _MIB:.0f} MiB")
    if free > 0 and (device.type == "cuda" or ranks > ranks_here):
        smaller.append(f"{math.ceil(needed / free)} ranks of this size hold it (tensor_parallel, pipeline_parallel)")
    remedy = "; ".join(smaller) or (
        "no supported precision fits; use a smaller model, a larger device, or ranks on several hosts"
    )
    raise InvalidConfiguration(
        "model",
        f"{folder.name} needs {here / _MIB:.0f} MiB for its weights, and {device} has {free / _MIB:.0f} MiB free; "
        f"{remedy}",
    )


def estimated_activation_bytes(
    config: ModelConfig, *, tokens: int, rows: int, tensor_parallel: int, itemsize: int
) -> int:
    """What the largest step takes beside weights and pages: `tokens` in one forward pass, `rows` of logits."""
    heads = (config.num_heads + 2 * max(1, config.num_kv_heads)) * config.head_dim / tensor_parallel
    experts = [layer.experts.intermediate_size for layer in config.layers if layer.experts is not None]
    inner = max([config.intermediate_size / tensor_parallel, *experts])
    per_token = 4 * config.hidden_size + 3 * heads + 4 * inner  # the residual stream, attention, the MLP; with copies
    return int(tokens * per_token * itemsize + 3 * rows * config.vocab_size * 4)


def budget_bytes(page: PageConfig, device: torch.device, free: int, sharing: int) -> int:
    """What one of `sharing` ranks on a device may use of what is free there."""
    return int(page.fraction(device.type) * free) // sharing


def fit_pages(
    page: PageConfig,
    shape: PageShape,
    *,
    free: int,
    budget: int,
    weights: int,
    activations: int,
    max_model_len: int,
    max_num_sequences: int,
) -> int:
    """Size of the pool in pages.

    Raises:
        InvalidConfiguration: it cannot hold one sequence of `max_model_len` tokens; with what could.
    """
    least = least_pages(page, max_model_len)  # refuses an explicit pool that is too small
    if page.num_pages is not None:
        wanted = page.num_pages * shape.page_bytes
        if wanted > free:
            raise InvalidConfiguration(
                "page.num_pages",
                f"{page.num_pages} pages of {shape.page_bytes / 1024:.0f} KiB are {wanted / _MIB:.0f} MiB, and "
                f"{max(0, free) / _MIB:.0f} MiB are free; give at most {max(0, free) // shape.page_bytes}",
            )
        return page.num_pages
    room = budget - weights - activations
    fitting = max(0, room) // shape.page_bytes
    if fitting < least:
        remedies = ["raise memory_fraction"]
        if fitting:
            remedies.insert(0, f"set max_model_len to at most {fitting * page.size}")
        if not shape.has_scales:
            remedies.append("use kv_dtype int8")
        remedies += ["store the weights smaller (dtype bfloat16, quantization int8)", "cut the model over more ranks"]
        raise InvalidConfiguration(
            "page.memory_fraction",
            f"{budget / _MIB:.0f} MiB for this rank hold weights of {weights / _MIB:.0f} MiB, activations of "
            f"{activations / _MIB:.0f} MiB and {fitting} pages of {shape.page_bytes / 1024:.0f} KiB, and one sequence "
            f"of max_model_len {max_model_len} needs {least}; {', or '.join(remedies)}",
        )
    return min(fitting, most_pages(page, max_model_len, max_num_sequences))
