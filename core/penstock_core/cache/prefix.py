"""PrefixCache: which page holds the keys and values of which prefix, and in what order idle ones are given up.

Only full pages are indexed. A page's name is SHA-256 over (name of the page before it, its tokens); the first parent is
derived from the tenant's salt, so equal prompts of two tenants have different names and neither can probe the other's.
Called by PagedAttentionKVCache only; knows page numbers, never tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


def root_digest(salt: str) -> bytes:
    """Parent of a tenant's first pages."""
    return sha256(b"penstock prefix v1\0" + salt.encode()).digest()


def extend_digests(digests: list[bytes], root: bytes, token_ids: Tokens, page_size: int) -> None:
    """Append to `digests` the names of the full pages of `token_ids` (int32 [num_tokens]) that it lacks."""
    for index in range(len(digests), len(token_ids) // page_size):
        parent = digests[index - 1] if index else root
        digests.append(sha256(parent + token_ids[index * page_size : (index + 1) * page_size].tobytes()).digest())


class PrefixCache:
    """Index of full pages by content, and the queue of those nobody holds, coldest first.

    A sequence gives its pages back last page first, and whoever holds a page also holds its parents, so the coldest
    page is always a leaf: a prefix is never evicted before its continuations (leaf-first LRU without a tree).
    """

    def __init__(self, num_pages: int) -> None:
        self._page_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_pages  # also of duplicates, which are not in the index
        self._root_of: list[bytes] = [b""] * num_pages
        self._cold: OrderedDict[int, None] = OrderedDict()
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0

    @property
    def num_indexed(self) -> int:
        """Indexed pages, held or not."""
        return len(self._page_of)

    @property
    def num_cold(self) -> int:
        """Indexed pages that no sequence holds: each can be revived by a hit or taken for new tokens."""
        return len(self._cold)

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Pages of the longest indexed prefix of the chain `digests`."""
        pages: list[int] = []
        page_of = self._page_of
        for digest in digests:
            page = page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def count(self, queried_tokens: int, hit_tokens: int) -> None:
        """Record one admission for the hit rate."""
        self.queried_tokens += queried_tokens
        self.hit_tokens += hit_tokens

    def index(self, page: int, digest: bytes, root: bytes) -> None:
        """Name a page whose content is computed, or will be by this step. A second page of a name stays a duplicate."""
        self._digest_of[page] = digest
        self._root_of[page] = root
        self._page_of.setdefault(digest, page)

    def is_cold(self, page: int) -> bool:
        """Whether the page waits in the queue of idle pages."""
        return page in self._cold

    def revive(self, page: int) -> None:
        """Take a cold page out of the queue: a sequence holds it again."""
        del self._cold[page]

    def retire(self, page: int) -> bool:
        """The last holder let go of `page`. True: it stays, as the newest cold page. False: it is not worth keeping."""
        digest = self._digest_of[page]
        if digest is None:
            return False
        holder = self._page_of.setdefault(digest, page)
        if holder != page:  # a duplicate: drop it, but its twin counts as just used, so that parents outlive children
            self._digest_of[page] = None
            if holder in self._cold:
                self._cold.move_to_end(holder)
            return False
        self._cold[page] = None
        return True

    def evict(self) -> tuple[int, bytes, bytes]:
        """Take the coldest page for other use; its (page, digest, root). Raises KeyError when none is cold."""
        page, _ = self._cold.popitem(last=False)
        digest = self._digest_of[page]
        assert digest is not None
        self._forget(page)
        self.evictions += 1
        return page, digest, self._root_of[page]

    def forget(self, page: int) -> bool:
        """Drop `page` from the index. True if it was cold: the caller now has a blank page."""
        was_cold = self._cold.pop(page, False) is None
        self._forget(page)
        return was_cold

    def pages_of(self, root: bytes | None) -> list[int]:
        """Named pages (duplicates too) of one tenant's root; all when it is None."""
        return [
            page
            for page, digest in enumerate(self._digest_of)
            if digest is not None and (root is None or self._root_of[page] == root)
        ]

    def _forget(self, page: int) -> None:
        digest = self._digest_of[page]
        self._digest_of[page] = None
        if digest is not None and self._page_of.get(digest) == page:
            del self._page_of[digest]
