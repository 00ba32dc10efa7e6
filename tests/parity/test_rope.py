"""Rotary tables equal transformers' own, and the dynamic kind equals what it uses token by token."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock_core.models.config import ModelConfig
from penstock_core.models.rope import RopeTable, cos_sin, inverse_frequencies
from tests.parity.families import CONFIGS

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    "family", ["llama 3 rope", "linear rope", "yarn rope", "yarn rope, every option", "phi 3, sliding, partly rotated"]
)
def test_frequencies_equal_transformers_bit_for_bit(family: str) -> None:
    config = CONFIGS[family]()
    rope = ModelConfig.from_dict({**config.to_dict(), "architectures": [architecture(config)]}).layers[0].rope
    assert rope is not None
    frequencies, factor = inverse_frequencies(rope)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        expected, expected_factor = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2).float() / 8), 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert torch.equal(frequencies, expected)
    assert factor == expected_factor


def test_dynamic_rows_are_those_of_the_length_at_which_the_token_was_generated() -> None:
    config = CONFIGS["dynamic rope"]()
    rope = ModelConfig.from_dict({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).layers[0].rope
    assert rope is not None
    table = cos_sin(rope, 600)
    for position in (0, 100, 255, 256, 300, 599):
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=position + 1)
        angles = position * frequencies
        torch.testing.assert_close(table[position], torch.cat([angles.cos(), angles.sin()]), rtol=1e-4, atol=1e-4)


def test_a_table_that_grew_keeps_its_rows() -> None:
    rope = (
        ModelConfig.from_dict({**CONFIGS["yarn rope"]().to_dict(), "architectures": ["LlamaForCausalLM"]})
        .layers[0]
        .rope
    )
    assert rope is not None
    table = RopeTable(rope, torch.device("cpu"))
    before = table.rows(10).clone()
    assert torch.equal(table.rows(5000)[: len(before)], before)


def architecture(config: transformers.PreTrainedConfig) -> str:
    return "Phi3ForCausalLM" if config.model_type == "phi3" else "LlamaForCausalLM"
