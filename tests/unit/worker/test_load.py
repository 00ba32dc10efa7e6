"""From flags to a running engine: what a flag says is what the engine does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.protocol.requests import SamplingParams
from penstock_worker import flags
from penstock_worker.load import load_engine, pipeline_config
from penstock_worker.models import resolve


def configured(*arguments: str) -> PipelineConfig:
    settings = flags.parse([*arguments, "--device=cpu"], {})
    return pipeline_config(settings, resolve(settings.model))


@pytest.fixture(scope="module")
def engine() -> Iterator[InferencePipelineExecutor]:
    flags_ = "--page-size=8 --host-pages=64 --kv-dtype=int8 --kv-cache-tokens=100 --batch-timeout-ms=20"
    executor = load_engine(configured(*flags_.split(), "--max-model-len=96", "--max-num-sequences=4"))
    assert isinstance(executor, InferencePipelineExecutor)
    yield executor
    executor.shutdown(timeout_s=10)


def test_pages_are_of_the_size_number_and_precision_that_was_asked_for(engine: InferencePipelineExecutor) -> None:
    told = engine.describe()
    assert (told.device, told.ranks, told.page_size, told.num_pages) == ("cpu", 1, 8, 13)
    assert engine.pipeline.engine.layers[0].k.dtype == torch.int8


def test_prefixes_without_room_go_to_host_memory_and_come_back(engine: InferencePipelineExecutor) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts = [[7 + number, *range(100, 180)] for number in range(4)]
    first = [result.token_ids for result in engine.generate(prompts, greedy)]
    assert engine.statistics().cache.offloaded_pages > 0
    again = [result.token_ids for result in engine.generate(prompts, greedy)]
    assert engine.statistics().cache.restored_pages > 0
    assert again == first


def test_an_idle_engine_holds_a_request_no_longer_than_it_may(engine: InferencePipelineExecutor) -> None:
    assert engine._company is not None
    assert engine._company.max_wait_s == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["--host-pages=8", "--no-prefix-cache"], "--host-pages: .*--no-prefix-cache"),
        (["--draft-model=penstock-story-draft"], "--draft-model: .*--speculation is off"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(arguments: list[str], refusal: str) -> None:
    with pytest.raises(InvalidConfiguration, match=refusal):
        configured(*arguments)


def test_ranks_of_one_worker_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert configured("--tensor-parallel=2").threads == 4
    assert configured("--tensor-parallel=2", "--threads=3").threads == 3
    assert configured().threads is None


def test_ranks_wait_for_one_another_as_long_as_was_asked_for() -> None:
    assert configured("--rank-timeout-s=7.5").distributed.timeout_s == 7.5
    assert configured().distributed.timeout_s == 120.0
