"""A small checkpoint with a tokenizer, the ways to cut it over processes, and executors over it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock_core.cache import PageConfig
from penstock_core.distributed import DistributedConfig
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
from penstock_core.protocol.requests import SamplingParams
from tests.parity.checkpoints import write_checkpoint

BUNDLED = Path(__file__).parents[2] / "worker/penstock_worker/bundled/penstock-story"
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True)
PROMPTS = [[(7 * i + 13 * n) % 2000 + 7 for i in range(n)] for n in (3, 17, 40)]
SHARED = [(5 * i) % 1900 + 7 for i in range(60)]
CUTS: dict[str, dict[str, Any]] = {
    "2 ranks": {"tensor_parallel": 2},
    "2 ranks over sockets": {"tensor_parallel": 2, "shared_memory": False},
    "2 stages": {"pipeline_parallel": 2, "micro_batch_tokens": 3},
    "2 stages of 2 ranks": {"tensor_parallel": 2, "pipeline_parallel": 2, "micro_batch_tokens": 16},
}


MADE: list[InferencePipelineExecutor] = []


@pytest.fixture
def closing() -> Iterator[None]:
    """A test that fails leaves no group behind: a process can be in one only."""
    yield
    while MADE:
        MADE.pop().pipeline.engine.close()


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


def executor(
    checkpoint: Path, cut: dict[str, Any], *, num_pages: int = 200, **options: Any
) -> InferencePipelineExecutor:
    page = {name: options.pop(name) for name in ("host_pages", "kv_dtype") if name in options}
    made = InferencePipelineExecutor(
        PipelineConfig(
            checkpoint,
            device="cpu",
            max_model_len=128,
            **{"max_batch_tokens": 6000, "max_num_sequences": 64, **options},
            page=PageConfig(page_size=8, num_pages=num_pages, **page),
            distributed=DistributedConfig(timeout_s=60.0, **cut),
        )
    )
    MADE.append(made)
    return made


def follower_ids(engine: InferencePipelineExecutor) -> list[int]:
    followers = engine.pipeline.engine._followers
    assert followers is not None
    return followers.process_ids
