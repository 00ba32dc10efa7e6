"""All layers in one call of the kernels: the same bits as layer by layer, for every family whose parts they know."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock_core.attention import AttentionBatch, LayerPages
from penstock_core.kernels import decoder, native
from penstock_core.models import DecoderModel, load_model
from tests.parity.checkpoints import pages_for, write_checkpoint
from tests.parity.families import CONFIGS

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        native.kernels() is None or native.kernels().instruction_set == "portable",  # type: ignore[union-attr]
        reason="needs vector kernels",
    ),
]

EXPERTS = {"qwen 3 moe", "qwen 3 moe, raw weights", "mixtral"}
PAGE = 4
STEPS = [  # of each sequence: (tokens, computed before); prefill, a chunk after it, decodes and draft checks together
    [([5, 9, 100, 3, 7, 7, 20, 44, 2, 100, 17, 180, 6], 0), ([150, 8], 0)],
    [([61], 13), ([33, 12, 99, 200, 61, 7, 7, 7, 90, 14, 15, 16, 17, 18, 19, 20, 55, 201, 42, 42, 9], 2)],
    [([7, 8, 9, 10, 11], 14), ([3], 23)],
    [([1], 16), ([2], 24)],
]
TABLES = [[3, 9, 0, 5, 7], [8, 2, 1, 12, 4, 10, 6, 11]]


@pytest.fixture(params=[1, 2], ids=["alone", "team"], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoder, "PARALLEL_WORK", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def states(model: DecoderModel, new_pages: Callable[[DecoderModel], list[LayerPages]]) -> list[torch.Tensor]:
    """Hidden states of every step, then the pages."""
    pages = new_pages(model)
    out = []
    for step in STEPS:
        tokens, computed = [list(new) for new, _ in step], [before for _, before in step]
        out.append(model.forward(AttentionBatch.build(tokens, computed, TABLES, PAGE), pages))
    return [*out, *(part for layer in pages for part in (layer.k, layer.v))]


def assert_same_bits(
    model: DecoderModel,
    new_pages: Callable[[DecoderModel], list[LayerPages]] = lambda model: pages_for(model, 13, PAGE),
) -> None:
    assert model.whole is not None
    together = states(model, new_pages)
    model.whole = None
    apart = states(model, new_pages)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_without_experts_runs_as_a_whole_with_the_same_bits(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS[family]())
    model = load_model(tmp_path)
    if family in EXPERTS:
        assert model.whole is None
    else:
        assert_same_bits(model)


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"deterministic": True}], ids=str)
def test_settings(options: dict[str, Any], tmp_path: Path) -> None:
    if "quantization" in options and native.kernels().linear_int8 is None:  # type: ignore[union-attr]
        pytest.skip("needs the VNNI kernel")
    write_checkpoint(tmp_path, CONFIGS["qwen 3"]())
    assert_same_bits(load_model(tmp_path, **options))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_16_bits(stored: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama, biased, wide heads"]()).to(stored).save_pretrained(tmp_path)
    assert_same_bits(load_model(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_pages_in_fewer_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"]())

    def new_pages(model: DecoderModel) -> list[LayerPages]:
        plain = pages_for(model, 13, PAGE, dtype)
        if dtype != torch.int8:
            return plain
        return [LayerPages(p.k, p.v, torch.zeros(p.k.shape[:3]), torch.zeros(p.k.shape[:3])) for p in plain]

    assert_same_bits(load_model(tmp_path), new_pages)


def test_what_the_kernels_do_not_know_goes_layer_by_layer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    assert load_model(tmp_path, dtype="bfloat16").whole is None
    with native.using(None):
        assert load_model(tmp_path).whole is None


def test_working_memory_lives_until_the_step_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    model = load_model(tmp_path)
    whole = model.whole
    assert whole is not None
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def scratch(tokens: int) -> torch.Tensor:
        memory = torch.empty(tokens * 100_000)
        made.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(whole, "scratch", scratch)
    monkeypatch.setattr(whole, "_kernels", SimpleNamespace(decode=lambda _: alive.append(made[-1]() is not None) or 1))
    model.forward(AttentionBatch.build([[1, 2, 3]], [0], [[0]], PAGE), pages_for(model, 1, PAGE))
    assert alive == [True]


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    model = load_model(tmp_path)
    for token in (-1, 211):
        with pytest.raises(IndexError, match="vocabulary of 211"):
            model.forward(AttentionBatch.build([[1, token]], [0], [[0]], PAGE), pages_for(model, 1, PAGE))
