"""The key/value cache: pages, their accounting, and the prefix cache in front of them."""

from penstock_core.cache.host import HostPages
from penstock_core.cache.kv_cache import CacheStatistics, PagedAttentionKVCache
from penstock_core.cache.pages import (
    PageConfig,
    PageShape,
    allocate_pages,
    least_pages,
    most_pages,
    move_pages,
    stored_dtype,
)
from penstock_core.cache.prefix import PrefixCache, extend_digests, root_digest

__all__ = [
    "CacheStatistics",
    "HostPages",
    "PageConfig",
    "PageShape",
    "PagedAttentionKVCache",
    "PrefixCache",
    "allocate_pages",
    "extend_digests",
    "least_pages",
    "most_pages",
    "move_pages",
    "root_digest",
    "stored_dtype",
]
