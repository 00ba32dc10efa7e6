"""Shared memory between ranks: the same sums everywhere, whoever is late, and no wait for the dead.

The ranks are threads here; a segment does not care whether its ranks share an address space.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from penstock_core.kernels import native, ranks
from penstock_core.kernels.ranks import RankLost, SharedSegment, available

pytestmark = pytest.mark.skipif(not available(), reason="no C compiler, or not Linux")


def group(size: int, slot_bytes: int = 4096) -> list[SharedSegment]:
    first = SharedSegment.create(size, slot_bytes)
    return [first, *(SharedSegment.join(first.address, rank, size) for rank in range(1, size))]


def together(segments: list[SharedSegment], work: Callable[[SharedSegment], object]) -> list[object]:
    with ThreadPoolExecutor(len(segments)) as pool:
        return list(pool.map(work, segments))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_sequence_of_calls_gives_every_rank_what_it_should(size: int) -> None:
    segments = group(size)
    shape = random.Random(size)
    calls = [
        (shape.choice(["sum", "sum", "rows", "bytes"]), shape.choice([1, 3, 64, 1024, 1025, 5000])) for _ in range(60)
    ]

    def part(rank: int, number: int, count: int) -> torch.Tensor:
        return torch.randn(count, generator=torch.Generator().manual_seed(1000 * number + rank))

    def work(segment: SharedSegment) -> list[torch.Tensor]:
        late = random.Random(segment.rank)
        results = []
        for number, (kind, count) in enumerate(calls):
            if late.random() < 0.1:
                time.sleep(0.002)  # some ranks are late, so that slots are reused while others still read
            mine = part(segment.rank, number, count)
            if kind == "sum":
                segment.all_reduce(mine)
                results.append(mine)
            elif kind == "bytes":
                segment.broadcast(mine.data_ptr(), mine.nbytes)
                results.append(mine)
            else:
                rows = mine.repeat(3, 1)
                out = torch.empty(3, count * size) if segment.rank == 0 else None
                segment.gather(rows, out)
                results.append(torch.empty(0) if out is None else out)
        return results

    each = together(segments, work)
    for number, (kind, count) in enumerate(calls):
        parts = [part(rank, number, count) for rank in range(size)]
        if kind == "sum":
            expected = parts[0]
            for other in parts[1:]:
                expected = expected + other  # in rank order, hence bit for bit
        elif kind == "bytes":
            expected = parts[0]
        else:
            assert torch.equal(each[0][number], torch.cat([p.repeat(3, 1) for p in parts], -1))  # type: ignore[index]
            continue
        for rank in range(size):
            assert torch.equal(each[rank][number], expected), (kind, count, rank)  # type: ignore[index]


def test_a_rank_that_left_ends_the_wait() -> None:
    first, second = group(2)
    assert first.lost() is None
    second.close()
    assert first.lost() == 1
    with pytest.raises(RankLost, match="rank 1 of 2 has ended"):
        first.all_reduce(torch.ones(4))
    with pytest.raises(RankLost, match="left"):
        second.all_reduce(torch.ones(4))


def test_a_killed_process_ends_the_wait_and_leaves_nothing_behind() -> None:
    first = SharedSegment.create(2)
    code = (
        "import sys, time; from penstock_core.kernels.ranks import SharedSegment\n"
        f"held = SharedSegment.join({first.address!r}, 1, 2); print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"in\n"
    assert first.lost() is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.all_reduce, torch.ones(4))
        other.kill()
        with pytest.raises(RankLost, match="rank 1 of 2 has ended"):
            waiting.result(timeout=120)
    other.wait()
    descriptor = first.address.split(":")[1]
    assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:"), "it has no name that could be left behind"


def test_a_rank_that_lives_and_does_not_come_is_given_up() -> None:
    first, _second = group(2)
    first.set_patience(timeout_s=0.05, spin_s=0.001)
    with pytest.raises(RankLost, match="rank 1 of 2 did not come in time"):
        first.all_reduce(torch.ones(4))


def test_what_was_said_last_is_still_heard_after_the_speaker_left() -> None:
    first, second = group(2)
    word = torch.arange(8)
    first.broadcast(word.data_ptr(), word.nbytes)
    first.close()
    heard = torch.zeros(8, dtype=torch.int64)
    second.broadcast(heard.data_ptr(), heard.nbytes)
    assert torch.equal(heard, word)


def test_an_address_of_another_process_is_refused() -> None:
    first = SharedSegment.create(2)
    process, descriptor, slots, token = first.address.split(":")
    with pytest.raises(OSError):
        SharedSegment.join(f"{process}:{descriptor}:{slots}:{'00' * (len(token) // 2)}", 1, 2)
    with pytest.raises(OSError):
        SharedSegment.join(f"{process}:99999:{slots}:{token}", 1, 2)


def test_without_kernels_there_is_no_segment() -> None:
    ranks._functions.cache_clear()
    with native.using(None):
        assert not available()
        with pytest.raises(OSError, match="kernels are not available"):
            SharedSegment.create(2)
    assert available()
