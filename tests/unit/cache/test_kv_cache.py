"""Page accounting: nothing is lost, nothing is held twice, and what is cached comes back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock_core.cache import PagedAttentionKVCache, extend_digests, root_digest

PAGE = 4


def chain(tokens: list[int], salt: str = "") -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, root_digest(salt), np.array(tokens, dtype=np.int32), PAGE)
    return digests


def fill(cache: PagedAttentionKVCache, tokens: list[int], salt: str = "") -> list[int]:
    """Pages of a sequence that computed all of `tokens`, sharing what is cached."""
    digests = chain(tokens, salt)
    pages = cache.match(digests)
    cache.acquire(pages)
    pages = pages + cache.allocate(-(-len(tokens) // PAGE) - len(pages))
    for page, digest in zip(pages, digests, strict=False):
        cache.index(page, digest, root_digest(salt))
    return pages


def test_used_cached_and_free_add_up() -> None:
    cache = PagedAttentionKVCache(10, PAGE, page_bytes=100)
    pages = fill(cache, list(range(11)))
    assert cache.statistics().used_pages == 3
    cache.release(pages)
    statistics = cache.statistics()
    assert (statistics.used_pages, statistics.cached_pages, statistics.free_pages) == (0, 2, 8)
    assert cache.num_available == 10
    cache.check(idle=True)


def test_shared_pages_are_counted_with_the_bytes_they_save() -> None:
    cache = PagedAttentionKVCache(10, PAGE, page_bytes=100)
    first = fill(cache, list(range(8)))
    second = fill(cache, list(range(8)))
    third = fill(cache, list(range(8)))
    assert first == second == third
    statistics = cache.statistics()
    assert (statistics.used_pages, statistics.shared_pages, statistics.bytes_saved) == (2, 2, 400)
    assert statistics.reuse_ratio == 3.0
    for pages in (first, second, third):
        cache.check()
        cache.release(pages)
    assert cache.statistics().bytes_saved == 0
    assert cache.statistics().reuse_ratio == 1.0


def test_blank_pages_are_used_before_anything_is_evicted() -> None:
    cache = PagedAttentionKVCache(6, PAGE)
    cache.release(fill(cache, list(range(8))))
    taken = cache.allocate(4)
    assert cache.statistics().evictions == 0
    taken += cache.allocate(1)
    assert cache.statistics().evictions == 1
    cache.release(taken)
    cache.check(idle=True)


def test_eviction_takes_the_least_recent_prefix_from_its_end() -> None:
    cache = PagedAttentionKVCache(6, PAGE)
    old, new = list(range(12)), list(range(100, 112))
    cache.release(fill(cache, old))
    cache.release(fill(cache, new))
    cache.release(cache.allocate(1))
    assert len(cache.match(chain(old))) == 2
    assert len(cache.match(chain(new))) == 3
    cache.release(fill(cache, old[:8]))  # used again: now the other is the older one
    held = cache.allocate(1 + 1 + 1)
    assert len(cache.match(chain(old))) == 2
    assert len(cache.match(chain(new))) == 1
    cache.release(held)


def test_hit_revives_cached_pages_from_the_middle_of_the_queue() -> None:
    cache = PagedAttentionKVCache(9, PAGE)
    texts = [list(range(n, n + 12)) for n in (0, 100, 200)]
    for text in texts:
        cache.release(fill(cache, text))
    held = fill(cache, texts[1])
    assert cache.num_available == 6
    taken = cache.allocate(6)
    assert cache.match(chain(texts[1])) == held
    assert cache.match(chain(texts[0])) == cache.match(chain(texts[2])) == []
    cache.release(taken)
    cache.release(held)
    cache.check(idle=True)


def test_more_than_there_is_cannot_be_allocated() -> None:
    cache = PagedAttentionKVCache(4, PAGE)
    cache.release(fill(cache, list(range(8))))
    with pytest.raises(IndexError, match="5 pages asked, 4 of 4"):
        cache.allocate(5)
    assert len(cache.allocate(4)) == 4


def test_double_release_is_noticed() -> None:
    cache = PagedAttentionKVCache(4, PAGE)
    pages = cache.allocate(1)
    cache.release(pages)
    with pytest.raises(RuntimeError, match="released more often"):
        cache.release(pages)


def test_copy_on_write_leaves_the_other_holder_its_page() -> None:
    cache = PagedAttentionKVCache(4, PAGE)
    pages = cache.allocate(2)
    cache.acquire(pages)
    fresh = cache.copy_on_write(pages[1])
    assert fresh not in pages
    assert [cache.holders(page) for page in (*pages, fresh)] == [2, 1, 1]
    assert cache.statistics().copies == 1
    cache.release(pages)
    cache.release([pages[0], fresh])
    cache.check(idle=True)


def test_idle_check_names_pages_that_leaked() -> None:
    cache = PagedAttentionKVCache(4, PAGE)
    cache.allocate(1)
    cache.check()
    with pytest.raises(RuntimeError, match="1 pages are held although no sequence runs"):
        cache.check(idle=True)


def test_invalidation_drops_one_tenant_or_all() -> None:
    cache = PagedAttentionKVCache(12, PAGE)
    text = list(range(8))
    cache.release(fill(cache, text, "a"))
    held = fill(cache, text, "b")
    assert cache.invalidate("a") == 2
    assert cache.match(chain(text, "a")) == []
    assert cache.match(chain(text, "b")) == held
    assert cache.invalidate() == 2
    assert cache.match(chain(text, "b")) == []
    cache.check()
    cache.release(held)
    assert cache.statistics().cached_pages == 0
    cache.check(idle=True)


def test_without_prefix_cache_nothing_is_kept() -> None:
    cache = PagedAttentionKVCache(4, PAGE, prefix_cache=False)
    cache.release(fill(cache, list(range(8))))
    assert cache.match(chain(list(range(8)))) == []
    assert cache.invalidate() == 0
    assert cache.statistics().free_pages == 4
    assert cache.statistics().hit_rate == 0.0


def test_duplicate_takes_the_place_of_an_evicted_twin() -> None:
    cache = PagedAttentionKVCache(3, PAGE)
    text = list(range(4))
    first, twin = cache.allocate(1), cache.allocate(1)
    for pages in (first, twin):
        cache.index(pages[0], chain(text)[0], root_digest(""))
    cache.release(first)
    taken = cache.allocate(2)  # evicts the first
    assert cache.match(chain(text)) == []
    cache.release(twin)
    assert cache.match(chain(text)) == twin
    cache.release(taken)
    cache.check(idle=True)


def test_duplicate_of_a_cached_page_is_dropped() -> None:
    cache = PagedAttentionKVCache(3, PAGE)
    text = list(range(4))
    first, twin = cache.allocate(1), cache.allocate(1)
    for pages in (first, twin):
        cache.index(pages[0], chain(text)[0], root_digest(""))
    cache.release(first)
    cache.release(twin)
    assert cache.statistics().cached_pages == 1
    assert cache.statistics().free_pages == 2
    assert cache.match(chain(text)) == first


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, grow and go; prefixes are shared, copied, evicted and invalidated."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedAttentionKVCache(16, PAGE)
        self.sequences: list[tuple[list[int], list[int]]] = []  # pages and tokens

    @rule(stem=st.integers(0, 2), length=st.integers(1, 24), own=st.integers(0, 3))
    def admit(self, stem: int, length: int, own: int) -> None:
        tokens = [stem] * length + [own] * 3
        needed = -(-len(tokens) // PAGE)
        if needed <= self.cache.num_available:
            self.sequences.append((fill(self.cache, tokens), tokens))

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        pages, _ = self.sequences.pop(which % len(self.sequences))
        self.cache.release(pages)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def write_last_page(self, which: int) -> None:
        pages, _ = self.sequences[which % len(self.sequences)]
        if self.cache.holders(pages[-1]) > 1 and self.cache.num_available:
            pages[-1] = self.cache.copy_on_write(pages[-1])

    @rule(everything=st.booleans())
    def invalidate(self, everything: bool) -> None:
        self.cache.invalidate(None if everything else "")

    @invariant()
    def pages_add_up(self) -> None:
        self.cache.check()
        held = [page for pages, _ in self.sequences for page in pages]
        assert self.cache.statistics().used_pages == len(set(held))
        assert all(self.cache.holders(page) == held.count(page) for page in set(held))

    @invariant()
    def cold_pages_are_found_with_all_their_parents(self) -> None:
        """Leaf first: while a cold page is indexed, the prefix that leads to it is, too."""
        prefix = self.cache.prefix
        assert prefix is not None
        known = {tuple(chain(tokens)) for stem in range(3) for n in range(25) for tokens in _texts(stem, n)}
        cold = {digest for digest, page in prefix._page_of.items() if prefix.is_cold(page)}
        for digests in known:
            for depth, digest in enumerate(digests):
                if digest in cold:
                    assert len(self.cache.match(digests)) > depth


def _texts(stem: int, length: int) -> list[list[int]]:
    return [[stem] * length + [own] * 3 for own in range(4)]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
