"""PageConfig and the page tensors: how many pages there are, what is stored in them, and how they are copied.

The engine calls this once to size and allocate the pool, and once per step to copy pages before they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from penstock_core.attention import LayerPages
from penstock_core.attention.pages import bits
from penstock_core.kernels import memory
from penstock_core.protocol.errors import InvalidConfiguration

KV_DTYPES = ("auto", "float32", "float16", "bfloat16", "int8", "float8")
USUAL_PAGE_SIZE = 16
_EIGHT_BITS = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class PageConfig:
    """Settings of the paged key/value cache.

    Attributes:
        page_size: tokens per page. None: 16, or on a GPU what its attention reads in place.
        num_pages: size of the pool; None takes as many as `memory_fraction` leaves room for, and no more than
            `max_num_sequences` sequences of full length can use.
        num_tokens: size of the pool in tokens, instead of `num_pages`.
        memory_fraction: share of the device's free memory for weights, activations and pages together, above 0 and up
            to 0.95; None: 0.9 on a GPU and 0.5 on a CPU, which others need too.
        kv_dtype: stored precision. `auto` is the model's own; `int8` and `float8` (e4m3) keep a scale per
            token and head.
        watermark: share of the pool that admitting a waiting sequence must leave available, so that the running ones
            can grow for a while before one of them is preempted.
        host_pages: pages of host memory that keep prefixes the device has no room for; 0 keeps none.
    """

    page_size: int | None = None
    num_pages: int | None = None
    num_tokens: int | None = None
    memory_fraction: float | None = None
    kv_dtype: str = "auto"
    watermark: float = 0.01
    host_pages: int = 0

    def __post_init__(self) -> None:
        if self.page_size is not None and not 1 <= self.page_size <= 1024:
            raise InvalidConfiguration("page.page_size", f"{self.page_size} is outside 1 to 1024 tokens")
        if self.num_pages is not None and self.num_pages < 1:
            raise InvalidConfiguration("page.num_pages", f"{self.num_pages} is below 1; None sizes the pool by memory")
        if self.num_tokens is not None and (self.num_tokens < 1 or self.num_pages is not None):
            raise InvalidConfiguration("page.num_tokens", f"{self.num_tokens} is below 1, or num_pages is given too")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 0.95:
            raise InvalidConfiguration("page.memory_fraction", f"{self.memory_fraction} is outside (0, 0.95]")
        if self.kv_dtype not in KV_DTYPES:
            raise InvalidConfiguration(
                "page.kv_dtype", f"{self.kv_dtype!r} is unknown; use one of {', '.join(KV_DTYPES)}"
            )
        if not 0.0 <= self.watermark <= 0.5:
            raise InvalidConfiguration("page.watermark", f"{self.watermark} is outside 0 to 0.5 of the pool")
        if self.host_pages < 0:
            raise InvalidConfiguration("page.host_pages", f"{self.host_pages} is below 0; 0 keeps none")

    @property
    def size(self) -> int:
        """`page_size`, or its default on a CPU."""
        return self.page_size or USUAL_PAGE_SIZE

    def sized(self, page_size: int) -> PageConfig:
        """The same with `page_size` where nothing else was asked for, and the pool counted in pages."""
        chosen = replace(self, page_size=self.page_size or page_size)
        if self.num_tokens is None:
            return chosen
        return replace(chosen, num_pages=-(-self.num_tokens // chosen.size), num_tokens=None)

    def fraction(self, device_type: str) -> float:
        """`memory_fraction`, or its default for a kind of device."""
        return self.memory_fraction or (0.9 if device_type == "cuda" else 0.5)


@dataclass(frozen=True, slots=True)
class PageShape:
    """What one page holds: all layers, `num_kv_heads` of this rank."""

    num_layers: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def has_scales(self) -> bool:
        """Whether keys and values are stored in 8 bits."""
        return self.dtype in _EIGHT_BITS.values()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values of all layers, scales included."""
        scales = 4 if self.has_scales else 0
        per_token_and_head = self.head_dim * self.dtype.itemsize + scales
        return 2 * self.num_layers * self.page_size * self.num_kv_heads * per_token_and_head


def stored_dtype(kv_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """The torch dtype that `PageConfig.kv_dtype` means for a model of `model_dtype`."""
    return model_dtype if kv_dtype == "auto" else _EIGHT_BITS.get(kv_dtype) or getattr(torch, kv_dtype)


def least_pages(config: PageConfig, max_model_len: int) -> int:
    """Pages that one sequence of full length needs.

    Raises InvalidConfiguration when an explicit pool is smaller than that, with what would do.
    """
    needed = -(-max_model_len // config.size)
    if config.num_pages is not None and config.num_pages < needed:
        raise InvalidConfiguration(
            "page.num_pages",
            f"{config.num_pages} pages of {config.size} hold {config.num_pages * config.size} tokens, "
            f"less than one sequence of max_model_len {max_model_len}; give at least {needed} pages, "
            f"or set max_model_len to at most {config.num_pages * config.size}",
        )
    return needed


def most_pages(config: PageConfig, max_model_len: int, max_num_sequences: int) -> int:
    """Pages that can ever be used at once."""
    return max_num_sequences * -(-max_model_len // config.size) + 1


def allocate_pages(shape: PageShape, num_pages: int, device: torch.device, *, pinned: bool = False) -> list[LayerPages]:
    """Zeroed page tensors of every layer. On the CPU the system commits memory when a page is first written.

    `pinned`: host memory from which a CUDA device copies without a detour.
    """
    size = (num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)

    def tensor(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if device.type != "cpu" or pinned:
            return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)
        return memory.zeros(size, dtype)

    layers = []
    for _ in range(shape.num_layers):
        k, v = tensor(size, shape.dtype), tensor(size, shape.dtype)
        if shape.has_scales:
            layers.append(LayerPages(k, v, tensor(size[:3], torch.float32), tensor(size[:3], torch.float32)))
        else:
            layers.append(LayerPages(k, v))
    return layers


def move_pages(
    sources: Sequence[LayerPages], destinations: Sequence[LayerPages], moves: Sequence[tuple[int, int]]
) -> None:
    """Copy whole pages (from, to) of every layer, within a pool or between pools on different devices.

    All are read before any is written.
    """
    from_pages, to_pages = (torch.tensor(side) for side in zip(*moves, strict=True))
    from_pages = from_pages.to(sources[0].k.device)
    to_pages = to_pages.to(destinations[0].k.device)
    for source, destination in zip(sources, destinations, strict=True):
        for old, new in (
            (source.k, destination.k),
            (source.v, destination.v),
            (source.k_scale, destination.k_scale),
            (source.v_scale, destination.v_scale),
        ):
            if old is not None and new is not None:
                bits(new)[to_pages] = bits(old)[from_pages].to(new.device)
