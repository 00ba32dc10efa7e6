"""Every supported family computes what transformers computes on the same weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from penstock_core.models import DecoderModel, load_model
from tests.parity.checkpoints import greedy, logits_of, reference_greedy, reference_logits, write_checkpoint
from tests.parity.families import CONFIGS

pytestmark = pytest.mark.parity

PROMPTS = [
    [5, 9, 100, 3, 7, 7, 20, 44, 2, 100, 17, 180, 6],
    [150, 8],
    [33, 12, 99, 200, 61, 7, 7, 7, 90, 14, 15, 16, 17, 18, 19, 20, 55, 201, 42, 42, 9],
]


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DecoderModel]:
    folder = tmp_path_factory.mktemp("checkpoint")
    reference = write_checkpoint(folder, request.param())
    return reference, load_model(folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("chunk", [1000, 6, 1], ids=["whole", "in chunks of 6", "token by token"])
def test_logits_equal_transformers(models: tuple[Any, DecoderModel], chunk: int) -> None:
    reference, model = models
    for prompt, ours in zip(PROMPTS, logits_of(model, PROMPTS, chunk), strict=True):
        expected = reference_logits(reference, prompt)
        error = (ours - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, f"relative error {error:.1e}"


@pytest.mark.parametrize("chunk", [1000, 5], ids=["whole", "in chunks of 5"])
def test_greedy_tokens_equal_transformers(models: tuple[Any, DecoderModel], chunk: int) -> None:
    reference, model = models
    ours = greedy(model, PROMPTS, 24, chunk)
    expected = [reference_greedy(reference, prompt, 24) for prompt in PROMPTS]
    assert ours == expected
    assert len({token for text in expected for token in text}) > 10, "a degenerate text proves nothing"
