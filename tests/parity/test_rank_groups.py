"""Groups of ranks at their edges: eight-bit pages, drafts, long messages, lost ranks, sizes that cannot be."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock_core.models import UnsupportedModel
from penstock_core.protocol.errors import EngineFailed, InvalidConfiguration
from penstock_core.speculative import SpeculationConfig
from tests.parity.cuts import CUTS, PROMPTS, SAMPLED, SHARED, checkpoint, closing, executor, follower_ids, one_thread

__all__ = ["checkpoint", "closing", "one_thread"]

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("closing")]


@pytest.mark.parametrize("cut", ["2 ranks", "2 stages"])
def test_eight_bit_pages_and_drafts(checkpoint: Path, cut: str) -> None:
    again = [PROMPTS[2] + PROMPTS[2][:30], SHARED + SHARED[:20]]  # something to look drafts up in
    options = {"kv_dtype": "int8", "speculation": SpeculationConfig(proposer="ngram", fixed_depth=3)}
    greedy = SAMPLED.model_copy(update={"temperature": 0.0})
    expected = executor(checkpoint, {}, **options).generate(again, greedy)
    made = executor(checkpoint, CUTS[cut], **options)
    together = made.generate(again, greedy)
    assert [result.token_ids for result in together] == [result.token_ids for result in expected]
    assert made.statistics().drafted_tokens > 0
    made.shutdown(timeout_s=30)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_step_that_needs_more_than_one_frame(checkpoint: Path, shared_memory: bool) -> None:
    prompts = [[(11 * i + 17 * n) % 2000 + 7 for i in range(100)] for n in range(40)]
    short = SAMPLED.model_copy(update={"max_tokens": 2})
    made = executor(checkpoint, {"tensor_parallel": 2, "shared_memory": shared_memory}, num_pages=800)
    group = made.pipeline.engine.group
    assert group is not None
    assert group.shared == shared_memory
    together = made.generate(prompts, short)
    made.shutdown(timeout_s=30)
    expected = executor(checkpoint, {}, num_pages=800).generate(prompts, short)
    assert [result.token_ids for result in together] == [result.token_ids for result in expected]


@pytest.mark.parametrize("cut", ["2 ranks", "2 ranks over sockets", "2 stages of 2 ranks"])
def test_rank_killed_mid_step_ends_the_group_with_the_reason(checkpoint: Path, cut: str) -> None:
    engine = executor(checkpoint, CUTS[cut])
    processes = [psutil.Process(pid) for pid in follower_ids(engine)]
    stream = engine.stream(PROMPTS[0], SAMPLED.model_copy(update={"max_tokens": 100}))
    next(stream)
    os.kill(processes[-1].pid, signal.SIGSTOP)  # so that the next step is under way when it dies
    killer = threading.Timer(0.2, processes[-1].kill)
    killer.start()
    with pytest.raises(EngineFailed, match=rf"rank {len(processes)} .* exit code -9"):
        list(stream)
    killer.join()
    with pytest.raises(EngineFailed, match="exit code -9"):  # and goes on saying so, at once
        engine.generate(PROMPTS, SAMPLED)
    assert "exit code" in (engine.pipeline.engine.fallen() or "")
    engine.pipeline.engine.close()
    assert not psutil.wait_procs(processes, timeout=120)[1], "followers outlive their group"


def test_idle_group_tells_that_a_rank_has_ended(checkpoint: Path) -> None:
    engine = executor(checkpoint, {"tensor_parallel": 2})
    assert engine.fallen() is None
    (pid,) = follower_ids(engine)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # without taking the exit code away from the engine
    assert "rank 1" in (engine.fallen() or "")
    with pytest.raises(EngineFailed, match=r"rank 1 .* exit code -9"):
        engine.generate(PROMPTS, SAMPLED)
    engine.pipeline.engine.close()


def test_followers_end_with_rank_0(checkpoint: Path) -> None:
    engine = executor(checkpoint, {"tensor_parallel": 2})
    process = psutil.Process(follower_ids(engine)[0])
    followers = engine.pipeline.engine._followers
    assert followers is not None
    assert not Path(followers._folder.name).exists(), "a killed rank 0 would leave it behind"
    pipe = followers._processes[0].stdin
    assert pipe is not None
    pipe.close()  # what the end of this process would do
    process.wait(timeout=120)
    engine.pipeline.engine.close()


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        ({"tensor_parallel": 3}, "sizes that do: 1, 2, 4"),
        ({"pipeline_parallel": 4}, "above the 3 layers .* at most 3"),
        ({"tensor_parallel": 2, "pipeline_parallel": 65}, "outside 1 to 64"),
    ],
)
def test_sizes_that_do_not_divide_the_model_are_refused(checkpoint: Path, cut: dict[str, Any], reason: str) -> None:
    with pytest.raises((UnsupportedModel, InvalidConfiguration), match=reason):
        executor(checkpoint, cut)


def test_second_group_in_one_process_is_refused(checkpoint: Path) -> None:
    first = executor(checkpoint, {"tensor_parallel": 2})
    with pytest.raises(InvalidConfiguration, match="close that engine first"):
        executor(checkpoint, {"tensor_parallel": 2})
    first.shutdown(timeout_s=30)
