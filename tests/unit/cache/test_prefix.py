"""Names of pages: chained, salted, and of full pages only."""

from __future__ import annotations

import numpy as np

from penstock_core.cache import extend_digests, root_digest


def names(tokens: list[int], salt: str = "", page_size: int = 4) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, root_digest(salt), np.array(tokens, dtype=np.int32), page_size)
    return digests


def test_only_full_pages_have_names() -> None:
    assert [len(names(list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_name_depends_on_everything_before() -> None:
    first, second = names([1, 2, 3, 4, 5, 6, 7, 8]), names([9, 2, 3, 4, 5, 6, 7, 8])
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert names([1, 2, 3, 4, 0, 0, 0, 0])[0] == first[0]


def test_equal_tokens_at_different_depths_have_different_names() -> None:
    repeated = names([1, 2, 3, 4] * 3)
    assert len(set(repeated)) == 3


def test_tenants_cannot_name_each_others_pages() -> None:
    assert not set(names(list(range(8)), "a")) & set(names(list(range(8)), "b"))


def test_names_can_be_extended_as_tokens_come() -> None:
    tokens = np.arange(40, dtype=np.int32)
    digests: list[bytes] = []
    for length in (3, 9, 9, 17, 40):
        extend_digests(digests, root_digest("x"), tokens[:length], 4)
    assert digests == names(list(range(40)), "x")
