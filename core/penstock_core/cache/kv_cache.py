"""PagedAttentionKVCache: who holds which page of keys and values.

Pages are counted by reference: sequences share the pages of a common prefix, and a page that somebody else holds is
copied before it is written. The batcher allocates and releases; the engine carries the tensors. Never looks at tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock_core.cache.host import HostPages
from penstock_core.cache.prefix import PrefixCache, root_digest


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """State of the page pool. `used + cached + free == total` always.

    Attributes:
        used_pages: held by at least one sequence. cached_pages: held by none, but found again by a prefix hit.
        shared_pages: held by more than one.
        queried_tokens, hit_tokens: tokens of admitted sequences, and how many of them needed no computing.
        bytes_saved: memory that sharing saves at this moment.
        evictions: cached pages given up for new tokens. copies: pages copied on write.
        host_pages: pages kept in host memory. offloaded_pages, restored_pages: moved there and back.
    """

    total_pages: int
    used_pages: int
    cached_pages: int
    free_pages: int
    shared_pages: int
    queried_tokens: int
    hit_tokens: int
    bytes_saved: int
    evictions: int
    copies: int
    page_bytes: int
    host_pages: int = 0
    offloaded_pages: int = 0
    restored_pages: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of admitted tokens that came from the cache, 0 to 1."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0

    @property
    def reuse_ratio(self) -> float:
        """Pages that sequences refer to per page really used; 1.0 without sharing."""
        extra = self.bytes_saved // self.page_bytes if self.page_bytes else 0
        return (self.used_pages + extra) / self.used_pages if self.used_pages else 1.0


class PagedAttentionKVCache:
    """Reference-counted pages with a prefix cache in front.

    Args:
        num_pages: size of the pool.
        page_size: tokens per page.
        page_bytes: bytes of one page over all layers (for the statistics).
        prefix_cache: keep the pages of finished sequences for later prompts that begin alike.
        host_pages: pages of host memory that evicted prefixes move to; 0 for none.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, page_bytes: int = 1, prefix_cache: bool = True, host_pages: int = 0
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.page_bytes = page_bytes
        self.prefix = PrefixCache(num_pages) if prefix_cache else None
        self.host = HostPages(host_pages) if prefix_cache and host_pages else None
        self._references = [0] * num_pages
        self._blank = list(
            range(num_pages - 1, -1, -1)
        )  # a stack: the page freed last is the one still in the CPU's cache
        self._extra_references = 0
        self._shared_pages = 0
        self._copies = 0

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out: blank ones, and cached ones by eviction."""
        return len(self._blank) + (self.prefix.num_cold if self.prefix else 0)

    @property
    def num_saved(self) -> int:
        """Pages that sharing saves at this moment: holders beyond the first, over all pages."""
        return self._extra_references

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Pages that already hold the longest known prefix of this chain; not yet acquired."""
        return self.prefix.match(digests) if self.prefix else []

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds, so that acquiring them takes them from the available ones."""
        references = self._references
        return sum(1 for page in pages if not references[page])

    def num_sole(self, pages: Iterable[int]) -> int:
        """How many of `pages` have one holder, who would make them available by letting go."""
        references = self._references
        return sum(1 for page in pages if references[page] == 1)

    def holders(self, page: int) -> int:
        """Number of sequences that hold `page`."""
        return self._references[page]

    def acquire(self, pages: Iterable[int]) -> None:
        """Become one more holder of each page."""
        for page in pages:
            count = self._references[page]
            self._references[page] = count + 1
            if count:
                self._extra_references += 1
                self._shared_pages += count == 1
            elif self.prefix:
                self.prefix.revive(page)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages for writing; evicts the coldest cached ones where no blank page is left.

        Raises IndexError when fewer than `count` are available: callers ask `num_available` first.
        """
        if count > self.num_available:
            raise IndexError(f"{count} pages asked, {self.num_available} of {self.num_pages} available")
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                assert self.prefix is not None
                page, digest, root = self.prefix.evict()
                if self.host is not None:
                    self.host.offload(page, digest, root)
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages, last first. Named ones stay cached until their room is needed."""
        for page in reversed(pages):
            count = self._references[page] - 1
            if count < 0:
                raise RuntimeError(f"page {page} released more often than it was acquired")
            self._references[page] = count
            if count:
                self._extra_references -= 1
                self._shared_pages -= count == 1
            elif self.prefix is None or not self.prefix.retire(page):
                self._blank.append(page)

    def copy_on_write(self, page: int) -> int:
        """Swap a held page for a fresh one, to be written by one holder alone; the caller copies the content."""
        (fresh,) = self.allocate(1)
        self.release([page])
        self._copies += 1
        return fresh

    def index(self, page: int, digest: bytes, root: bytes) -> None:
        """Make a full page findable by its content."""
        if self.prefix:
            self.prefix.index(page, digest, root)

    def forget(self, pages: Iterable[int]) -> int:
        """Drop pages from the prefix index (their holders keep them); the number dropped."""
        dropped = 0
        if self.prefix:
            for page in pages:
                dropped += 1
                if self.prefix.forget(page):
                    self._blank.append(page)
        return dropped

    def invalidate(self, salt: str | None = None) -> int:
        """Forget every cached prefix, or those of one tenant salt; the number of pages dropped."""
        if self.prefix is None:
            return 0
        root = root_digest(salt) if salt is not None else None
        return self.forget(self.prefix.pages_of(root)) + (self.host.forget(root) if self.host is not None else 0)

    def statistics(self) -> CacheStatistics:
        """The pool at this moment."""
        prefix = self.prefix
        cached = prefix.num_cold if prefix else 0
        return CacheStatistics(
            total_pages=self.num_pages,
            used_pages=self.num_pages - len(self._blank) - cached,
            cached_pages=cached,
            free_pages=len(self._blank),
            shared_pages=self._shared_pages,
            queried_tokens=prefix.queried_tokens if prefix else 0,
            hit_tokens=prefix.hit_tokens if prefix else 0,
            bytes_saved=self._extra_references * self.page_bytes,
            evictions=prefix.evictions if prefix else 0,
            copies=self._copies,
            page_bytes=self.page_bytes,
            host_pages=self.host.num_used if self.host else 0,
            offloaded_pages=self.host.offloaded_pages if self.host else 0,
            restored_pages=self.host.restored_pages if self.host else 0,
        )

    def check(self, *, idle: bool = False) -> None:
        """Recount everything; raises RuntimeError if a page is lost, counted twice, or (when `idle`) still held."""
        held = {page for page, count in enumerate(self._references) if count}
        blank = set(self._blank)
        cold = {page for page in range(self.num_pages) if self.prefix and self.prefix.is_cold(page)}
        counts = f"used {len(held)} + cached {len(cold)} + free {len(self._blank)}, total {self.num_pages}"
        if len(blank) != len(self._blank) or held & blank or held & cold or blank & cold:
            raise RuntimeError(f"a page is in two places: {counts}")
        if len(held) + len(blank) + len(cold) != self.num_pages:
            raise RuntimeError(f"pages are lost: {counts}")
        extra = sum(count - 1 for count in self._references if count)
        if extra != self._extra_references or self._shared_pages != sum(count > 1 for count in self._references):
            raise RuntimeError(f"sharing is miscounted: {extra} extra references, {self._extra_references} on record")
        if self.host is not None:
            self.host.check()
        if idle and held:
            raise RuntimeError(f"{len(held)} pages are held although no sequence runs: {counts}")
