"""A model cut over processes computes what the whole model computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from penstock_core.models import TensorParallelGroup, UnsupportedModel, load_model
from tests.parity.checkpoints import logits_of, write_checkpoint
from tests.parity.families import CONFIGS

pytestmark = pytest.mark.parity

PROMPTS = [[5, 9, 100, 3, 7, 7, 20, 44, 2, 100, 17], [150, 8, 33]]


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("llama, biased, wide heads", 2),
        ("llama, one KV head", 2),
        ("qwen 3 moe", 2),
        ("phi 3", 2),
        ("olmo 2", 2),
        ("olmo 2", 4),  # two KV heads, each held by two ranks
        ("gemma 2", 2),
    ],
)
def test_ranks_together_equal_one_rank(family: str, size: int, tmp_path: Path) -> None:
    folder, work = tmp_path / "model", tmp_path / "work"
    work.mkdir()
    write_checkpoint(folder, CONFIGS[family]())
    torch.save(PROMPTS, work / "prompts.pt")
    command = [sys.executable, "-m", "tests.parity.ranks", str(folder), str(work)]
    ranks = [subprocess.Popen([*command, str(rank), str(size)]) for rank in range(size)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * size
    whole = logits_of(load_model(folder), PROMPTS)
    for rank in range(size):
        for ours, expected in zip(torch.load(work / f"logits-{size}-{rank}.pt"), whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_group_that_does_not_divide_the_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    with pytest.raises(UnsupportedModel, match=r"size 3 does not divide .*4.*sizes that do: 1, 2, 4"):
        load_model(tmp_path, group=TensorParallelGroup(0, 3))
