"""The `deterministic` setting: logits are bit for bit the same whatever the chunking and the company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock_core.kernels import linear, native
from penstock_core.models import DecoderModel, load_model
from tests.parity.checkpoints import logits_of, reference_logits, write_checkpoint
from tests.parity.families import CONFIGS

pytestmark = pytest.mark.parity

PROMPTS = [[5, 9, 100, 3, 7, 7, 20, 44, 2, 100, 17, 180, 6, 61, 90], [150, 8], [33, 12, 99, 1, 1, 1, 7]]


def bits_hold(model: DecoderModel) -> bool:
    together = logits_of(model, PROMPTS)
    chunked = [logits_of(model, PROMPTS, chunk) for chunk in (1, 4)]
    alone = [logits_of(model, [prompt])[0] for prompt in PROMPTS]
    return all(torch.equal(a, b) for other in (*chunked, alone) for a, b in zip(together, other, strict=True))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("family", ["llama", "qwen 3 moe", "gemma 2", "olmo 2"])
def test_bits_hold(family: str, kernels: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS[family]())
    with native.using(native.kernels() if kernels else None):
        assert bits_hold(load_model(tmp_path, deterministic=True))


def test_int8_bits_hold(tmp_path: Path) -> None:
    if native.kernels() is None or native.kernels().linear_int8 is None:  # type: ignore[union-attr]
        pytest.skip("needs the VNNI kernel")
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    assert bits_hold(load_model(tmp_path, deterministic=True, quantization="int8"))


def test_by_the_kernels_they_hold_without_the_setting(tmp_path: Path) -> None:
    if not linear.reads_stored_weights():
        pytest.skip("needs vector kernels")
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    assert bits_hold(load_model(tmp_path))


def test_without_the_setting_they_need_not_hold(tmp_path: Path) -> None:
    """If this fails, library products have become invariant, and the setting has nothing left to do there."""
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    with native.using(None):
        assert not bits_hold(load_model(tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen 3", "gemma 3", "phi 3, sliding, partly rotated", "mixtral"])
def test_plain_pytorch_computes_the_same(family: str, tmp_path: Path) -> None:
    """Where there is no compiler, everything still works."""
    reference = write_checkpoint(tmp_path, CONFIGS[family]())
    with native.using(None):
        for prompt, ours in zip(PROMPTS, logits_of(load_model(tmp_path), PROMPTS, 6), strict=True):
            expected = reference_logits(reference, prompt)
            assert (ours - expected).abs().max() / expected.abs().max() <= 1e-4
