"""A model cut over processes, by slices of its layers, by stages of them, or both, computes what the whole computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock_core.models import Stage, TensorParallelGroup, UnsupportedModel, load_model
from tests.parity.checkpoints import logits_of, write_checkpoint
from tests.parity.families import CONFIGS

pytestmark = pytest.mark.parity

PROMPTS = [[5, 9, 100, 3, 7, 7, 20, 44, 2, 100, 17], [150, 8, 33]]
BY_FOUR = ["llama", "llama, one KV head", "qwen 3", "olmo 2", "gemma 2", "mixtral"]  # five experts, on four ranks too
CUTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "2 ranks": ({"tensor_parallel": 2}, list(CONFIGS)),
    "2 ranks over sockets": ({"tensor_parallel": 2, "shared_memory": False}, ["llama", "qwen 3 moe"]),
    "4 ranks": ({"tensor_parallel": 4}, BY_FOUR),
    "2 stages": ({"pipeline_parallel": 2}, list(CONFIGS)),
    "3 stages over sockets": ({"pipeline_parallel": 3, "shared_memory": False}, ["llama", "qwen 3 moe"]),
    "2 stages of 2 ranks": ({"tensor_parallel": 2, "pipeline_parallel": 2}, [*BY_FOUR, "qwen 3 moe", "phi 3"]),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name, config in CONFIGS.items():
        write_checkpoint(folder / name, config())
    torch.save(PROMPTS, folder / "prompts.pt")
    return folder


@pytest.mark.parametrize("name", CUTS)
def test_ranks_together_equal_one_rank(name: str, checkpoints: Path) -> None:
    config, families = CUTS[name]
    size = config.get("tensor_parallel", 1) * config.get("pipeline_parallel", 1)
    for left in ("rendezvous", "logits.pt"):
        (checkpoints / left).unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.parity.ranks", str(checkpoints)]
    environment = {**os.environ, "RANK_ORDER": json.dumps({"config": config, "families": families})}
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(size)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
    together = torch.load(checkpoints / "logits.pt")
    for family in families:
        whole = logits_of(load_model(checkpoints / family), PROMPTS)
        for ours, expected in zip(together[family], whole, strict=True):
            close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
            torch.testing.assert_close(ours, expected, **close, msg=lambda text, name=family: f"{name}: {text}")


@pytest.mark.parametrize("index", [0, 1])
def test_a_stage_reads_its_own_layers_only(index: int, checkpoints: Path) -> None:
    read = []
    model = load_model(
        checkpoints / "mistral", stage=Stage(index, 2), progress=lambda done, total: read.append(done / total)
    )
    assert model.num_local_layers == (2, 1)[index]  # of three: the last stage has the head besides
    assert 0.3 < max(share for share in read if share < 1.0) < 0.7


def test_a_group_that_does_not_divide_the_model_is_refused(checkpoints: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"size 3 does not divide .*4.*sizes that do: 1, 2, 4"):
        load_model(checkpoints / "llama", group=TensorParallelGroup(0, 3))
    with pytest.raises(UnsupportedModel, match=r"size 3 does not divide .*sizes that do: 1, 2, 4$"):
        load_model(checkpoints / "mixtral", group=TensorParallelGroup(0, 3))
    with pytest.raises(UnsupportedModel, match=r"size 4 is above the 3 layers .*at most 3"):
        load_model(checkpoints / "llama", stage=Stage(0, 4))
