"""A model cut over processes says what it says whole; a group that loses a rank ends, and says so."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from penstock_core.cache import PageConfig
from penstock_core.distributed import DistributedConfig
from penstock_core.models import UnsupportedModel
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
from penstock_core.protocol.errors import EngineFailed
from penstock_core.protocol.requests import SamplingParams
from tests.parity.checkpoints import write_checkpoint

pytestmark = pytest.mark.parity

BUNDLED = Path(__file__).parents[2] / "worker/penstock_worker/bundled/penstock-story"
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True)
PROMPTS = [[(7 * i + 13 * n) % 2000 + 7 for i in range(n)] for n in (3, 17, 40)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
    )
    write_checkpoint(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


def executor(checkpoint: Path, ranks: int, **page: int) -> InferencePipelineExecutor:
    return InferencePipelineExecutor(
        PipelineConfig(
            checkpoint,
            device="cpu",
            max_model_len=128,
            max_batch_tokens=6000,
            page=PageConfig(page_size=8, num_pages=page.pop("num_pages", 100), **page),
            distributed=DistributedConfig(tensor_parallel=ranks, timeout_s=60.0),
        )
    )


def follower_ids(engine: InferencePipelineExecutor) -> list[int]:
    followers = engine.pipeline.engine._followers
    assert followers is not None
    return followers.process_ids


def test_two_ranks_generate_what_one_does(checkpoint: Path) -> None:
    options = [
        SAMPLED,
        SAMPLED.model_copy(update={"n": 3, "logprobs": 2}),
        SAMPLED.model_copy(update={"temperature": 0.0, "prompt_logprobs": 1}),
    ]
    alone = executor(checkpoint, 1).generate(PROMPTS, options)
    group = executor(checkpoint, 2, num_pages=20, host_pages=50)
    for _ in range(2):  # the second time with hits, evictions and trips to host memory
        together = group.generate(PROMPTS, options)
        for one, two in zip(alone, together, strict=True):
            assert [choice.token_ids for choice in two.choices] == [choice.token_ids for choice in one.choices]
        for one_record, two_record in zip(
            alone[2].prompt_logprobs or (), together[2].prompt_logprobs or (), strict=True
        ):
            if one_record is not None and two_record is not None:
                assert two_record.logprob == pytest.approx(one_record.logprob, abs=1e-4)
    assert group.statistics().cache.restored_pages > 0
    processes = [psutil.Process(pid) for pid in follower_ids(group)]
    group.shutdown(timeout_s=30)
    assert not psutil.wait_procs(processes, timeout=30)[1], "followers outlive their group"


def test_step_that_needs_more_than_one_frame(checkpoint: Path) -> None:
    prompts = [[(11 * i + 17 * n) % 2000 + 7 for i in range(100)] for n in range(40)]
    short = SAMPLED.model_copy(update={"max_tokens": 2})
    group = executor(checkpoint, 2, num_pages=800)
    together = group.generate(prompts, short)
    group.shutdown(timeout_s=30)
    alone = executor(checkpoint, 1, num_pages=800).generate(prompts, short)
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]


def test_lost_rank_ends_the_group_and_its_requests_with_the_reason(checkpoint: Path) -> None:
    engine = executor(checkpoint, 2)
    os.kill(follower_ids(engine)[0], signal.SIGKILL)
    with pytest.raises(EngineFailed, match=r"rank 1 .* exit code -9|group is broken"):
        engine.generate(PROMPTS, SAMPLED)
    engine.pipeline.engine.close()


def test_followers_end_with_rank_0(checkpoint: Path) -> None:
    engine = executor(checkpoint, 2)
    process = psutil.Process(follower_ids(engine)[0])
    followers = engine.pipeline.engine._followers
    assert followers is not None
    pipe = followers._processes[0].stdin
    assert pipe is not None
    pipe.close()  # what the end of this process would do
    process.wait(timeout=30)
    engine.pipeline.engine.close()


def test_sizes_that_do_not_divide_the_model_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedModel, match="sizes that do: 1, 2, 4"):
        executor(checkpoint, 3)
