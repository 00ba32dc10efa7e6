"""What does not fit is refused before it is loaded, with what would fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from penstock_core.cache import PageConfig, PageShape
from penstock_core.distributed import DistributedInferenceEngine, EngineConfig, memory
from penstock_core.distributed.inputs import choose_device
from penstock_core.distributed.measure import measure_activations
from penstock_core.models import BrokenCheckpoint, ModelConfig
from penstock_core.protocol.errors import InvalidConfiguration

BUNDLED = Path(__file__).parents[3] / "worker/penstock_worker/bundled/penstock-story"


CPU = torch.device("cpu")


def test_only_the_files_that_are_loaded_are_counted_and_damage_is_named(tmp_path: Path) -> None:
    """The story: a header cut off was a traceback, and a second copy beside the index counted twice."""
    shutil.copy(BUNDLED / "model.safetensors", tmp_path)
    shutil.copy(BUNDLED / "model.safetensors", tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"any": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert memory.weight_bytes(tmp_path, 1) == memory.weight_bytes(BUNDLED, 1)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors: damaged or incomplete .*; download it again"):
        memory.weight_bytes(tmp_path, 1)


def test_weights_are_counted_from_headers() -> None:
    config = json.loads((BUNDLED / "config.json").read_text())
    embedding = config["vocab_size"] * config["hidden_size"]
    elements = memory.weight_bytes(BUNDLED, 1)
    assert embedding < elements < 3 * embedding + 30_000_000
    assert memory.weight_bytes(BUNDLED, 4) == 4 * elements
    assert memory.weight_bytes(BUNDLED, None) == pytest.approx((BUNDLED / "model.safetensors").stat().st_size, rel=0.02)


@pytest.mark.parametrize(
    ("share", "remedy"),
    [(1.2, "dtype bfloat16 needs .*; quantization int8 needs"), (0.6, "; quantization int8 needs"), (0.2, "smaller")],
)
def test_model_that_does_not_fit_is_refused_with_what_would(
    monkeypatch: pytest.MonkeyPatch, share: float, remedy: str
) -> None:
    free = int(share * memory.weight_bytes(BUNDLED, 2))
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: free)
    monkeypatch.setattr(memory, "stored_weight_dtype", lambda *kind: torch.float32)  # as on a machine without kernels
    config = ModelConfig.from_checkpoint(BUNDLED)
    with pytest.raises(InvalidConfiguration, match=remedy):
        memory.check_weights_fit(BUNDLED, config, CPU, "float32", None)
    if share > 0.5:
        memory.check_weights_fit(BUNDLED, config, CPU, "float32", "int8")
    # Ranks of one host have no more memory together; ranks of many have.
    memory.check_weights_fit(BUNDLED, config, CPU, "float32", None, ranks=64, ranks_here=1)


@pytest.mark.parametrize("stored", [None, torch.float32])
def test_weights_take_what_their_dtype_says(monkeypatch: pytest.MonkeyPatch, stored: torch.dtype | None) -> None:
    monkeypatch.setattr(memory, "stored_weight_dtype", lambda *kind: stored)
    config = ModelConfig.from_checkpoint(BUNDLED)
    width = 2 if stored is None else 4  # the bundled model is stored in 16 bits
    assert memory.needed_weight_bytes(BUNDLED, config, CPU, "float32", None) == memory.weight_bytes(BUNDLED, width)


def fitted(page: PageConfig, budget: int, weights: int = 1000, activations: int = 2000) -> int:
    shape = PageShape(num_layers=1, page_size=16, num_kv_heads=1, head_dim=32, dtype=torch.float32)
    assert shape.page_bytes == 4096
    return memory.fit_pages(
        page,
        shape,
        free=2 * budget,
        budget=budget,
        weights=weights,
        activations=activations,
        max_model_len=160,
        max_num_sequences=4,
    )


def test_pool_takes_what_the_budget_leaves_and_no_more_than_can_be_used() -> None:
    assert fitted(PageConfig(), 3000 + 20 * 4096) == 20
    assert fitted(PageConfig(), 10**9) == 41
    assert fitted(PageConfig(num_pages=77), 10**9) == 77
    assert memory.budget_bytes(PageConfig(), CPU, 1000, 2) == 250
    assert memory.budget_bytes(PageConfig(memory_fraction=0.8), CPU, 1000, 1) == 800
    assert memory.budget_bytes(PageConfig(), torch.device("cuda"), 1000, 1) == 900


def test_pool_that_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(
        InvalidConfiguration,
        match=r"page\.memory_fraction: .*max_model_len to at most 64, or raise.*int8.*more ranks",
    ):
        fitted(PageConfig(), 3000 + 4 * 4096)
    with pytest.raises(InvalidConfiguration, match=r"hold weights of 95 MiB.* and 0 pages"):
        fitted(PageConfig(), 10**6, weights=10**8)
    with pytest.raises(InvalidConfiguration, match=r"page\.num_pages: .*give at most 20"):
        fitted(PageConfig(num_pages=77), 10 * 4096)


def test_memory_is_reported() -> None:
    config = EngineConfig(BUNDLED, device="cpu", max_model_len=128, page=PageConfig(num_pages=64))
    engine = DistributedInferenceEngine.load(config)
    (report,) = engine.memory
    assert report.rank == 0
    assert report.weights >= memory.weight_bytes(BUNDLED, 1)
    assert report.pages == 64 * engine.page_bytes
    assert report.weights + report.activations < report.budget < report.free
    assert "weights" in str(report)


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


def test_largest_step_can_be_run_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA its memory is measured; that the step itself runs can be seen anywhere."""
    held = iter([1000, 5000])
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(held))
    config = EngineConfig(BUNDLED, device="cpu", page=PageConfig(num_pages=9))
    engine = DistributedInferenceEngine.load(config)
    sizes = []
    forward = engine.model.forward
    monkeypatch.setattr(
        engine.model, "forward", lambda batch, *rest: sizes.append(batch.num_tokens) or forward(batch, *rest)
    )
    shape = PageShape(engine.model.num_local_layers, 16, engine.model.num_local_kv_heads, 32, torch.float32)
    measured = measure_activations(engine.model, shape, tokens=1000, sequences=3, length=48, rows=200)
    assert measured == 4000
    assert sizes == [144]


@pytest.mark.gpu
def test_memory_is_measured_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (report,) = DistributedInferenceEngine.load(EngineConfig(BUNDLED, device="cuda", max_model_len=256)).memory
    assert memory.weight_bytes(BUNDLED, None) <= report.weights
    assert report.activations > 0
    assert report.weights + report.activations + report.pages <= report.budget < report.free
