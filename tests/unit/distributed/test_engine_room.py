"""What does not fit is refused before it is loaded, with what would fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from penstock_core.cache import PageConfig
from penstock_core.distributed import DistributedInferenceEngine, EngineConfig, memory
from penstock_core.distributed.engine import choose_device
from penstock_core.models import ModelConfig
from penstock_core.protocol.errors import InvalidConfiguration

BUNDLED = Path(__file__).parents[3] / "worker/penstock_worker/bundled/penstock-story"


def weights_mib() -> float:
    return memory.weight_elements(BUNDLED) * 4 / 2**20


def test_weights_are_counted_from_headers() -> None:
    config = json.loads((BUNDLED / "config.json").read_text())
    embedding = config["vocab_size"] * config["hidden_size"]
    elements = memory.weight_elements(BUNDLED)
    assert embedding < elements < 3 * embedding + 30_000_000
    assert elements * 2 == pytest.approx((BUNDLED / "model.safetensors").stat().st_size, rel=0.02)


@pytest.mark.parametrize(
    ("share", "remedy"),
    [
        (0.6, "dtype bfloat16 needs .*; quantization int8 needs"),
        (0.3, "; quantization int8 needs"),
        (0.1, "smaller model"),
    ],
)
def test_model_that_does_not_fit_is_refused_with_what_would(
    monkeypatch: pytest.MonkeyPatch, share: float, remedy: str
) -> None:
    free = int(share * memory.weight_elements(BUNDLED) * 4)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: free)
    config = ModelConfig.from_checkpoint(BUNDLED)
    with pytest.raises(InvalidConfiguration, match=remedy):
        memory.check_weights_fit(BUNDLED, config, torch.device("cpu"), "float32", None)
    if share > 0.25:
        memory.check_weights_fit(BUNDLED, config, torch.device("cpu"), "float32", "int8")


def test_free_memory_is_bounded_by_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    unlimited = memory.free_memory_bytes(torch.device("cpu"))
    assert unlimited > 1000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert memory.free_memory_bytes(torch.device("cpu")) > 1000
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.free_memory_bytes(torch.device("cpu")) == 1000


def test_length_is_the_models_or_the_pools() -> None:
    def length(max_model_len: int | None, page: PageConfig) -> int:
        config = EngineConfig(BUNDLED, device="cpu", max_model_len=max_model_len, max_num_sequences=1, page=page)
        return DistributedInferenceEngine.load(config).max_model_len

    longest = ModelConfig.from_checkpoint(BUNDLED).max_position
    assert length(None, PageConfig()) == longest
    assert length(None, PageConfig(num_pages=4)) == 64
    assert length(100, PageConfig()) == 100
    with pytest.raises(InvalidConfiguration, match="max_model_len"):
        length(longest + 1, PageConfig())
    with pytest.raises(InvalidConfiguration, match=r"page\.num_pages"):
        length(100, PageConfig(num_pages=4))


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(InvalidConfiguration, match="device"):
        choose_device(name)


def test_loading_reports_progress(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "model")
    seen: list[tuple[int, int]] = []
    config = EngineConfig(tmp_path / "model", device="cpu", page=PageConfig(num_pages=64))
    DistributedInferenceEngine.load(config, lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1]
