"""A checkpoint is loaded whole or refused, with an error that names what is wrong, where, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock_core.models import BrokenCheckpoint, ModelConfig, UnsupportedModel, load_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


def tensors() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens": (32, 16), "model.norm": (16,), "lm_head": (32, 16)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.input_layernorm": (16,), f"{prefix}.post_attention_layernorm": (16,)}
        shapes |= {f"{prefix}.self_attn.{name}_proj": (8 if name in "kv" else 16, 16) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj": (24, 16) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj": (16, 24)}
    return {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    content = load_file(folder / "model.safetensors")
    edit(content)
    save_file(content, folder / "model.safetensors")


def test_the_untouched_checkpoint_loads_and_reports_progress(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 tensors.*model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "extra has no place"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(17)}),
            r"model.safetensors: tensor model.norm.weight is \[17\], config.json implies \[16\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(32, 16, dtype=torch.int8)}),
            "lm_head.weight is I8, expected one of F32, BF16, F16",
        ),
    ],
    ids=["missing tensor", "unexpected tensor", "wrong shape", "quantised tensor"],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], names: str
) -> None:
    change(folder, edit)
    with pytest.raises(BrokenCheckpoint, match=names):
        load_model(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors: damaged or incomplete .* download it again"):
        load_model(folder)


def test_pickle_checkpoints_are_refused_with_the_remedy(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BrokenCheckpoint, match=r"pytorch_model\.bin: pickle .*save_pretrained"):
        load_model(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenCheckpoint, match=r"model-00002-of-00002\.safetensors: no such file"):
        load_model(folder)


def test_an_index_cannot_point_outside_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(BrokenCheckpoint, match="outside the checkpoint folder"):
        load_model(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_no_json_object_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(BrokenCheckpoint, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not supported; supported: .*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "t5"}, "model_type 't5' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported; supported: default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' without a factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' without low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 3}}, "rope option 'wobble'"),
        ({"alibi_slopes": 3}, "alibi_slopes = 3 is not supported"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported; supported: silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\) is not supported; use the"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer type 'linear_attention'"),
    ],
)
def test_what_the_config_asks_for_and_is_not_computed_is_named(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UnsupportedModel, match=names):
        ModelConfig.from_dict(CONFIG | options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"hidden_size": None}, "needs hidden_size"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "4 is not a multiple of 3"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, num_hidden_layers 2"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is missing"),
    ],
)
def test_a_config_that_contradicts_itself_is_named(options: dict[str, Any], names: str) -> None:
    with pytest.raises(BrokenCheckpoint, match=names):
        ModelConfig.from_dict(CONFIG | options)


def test_options_that_change_nothing_are_accepted() -> None:
    plain = ModelConfig.from_dict(CONFIG)
    noise = {"transformers_version": "9.9", "use_cache": False, "pretraining_tp": 2, "new_switch": False, "_x": None}
    assert ModelConfig.from_dict(CONFIG | noise) == plain


def test_both_generations_of_rope_options_mean_the_same() -> None:
    old = CONFIG | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {k: v for k, v in CONFIG.items() if k != "rope_theta"} | {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    }
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is not supported; supported: auto, float32"),
        ({"quantization": "int4"}, "quantization 'int4' is not supported; supported: int8"),
    ],
)
def test_unknown_precisions_are_named(folder: Path, arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(UnsupportedModel, match=names):
        load_model(folder, **arguments)


def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="no such folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(BrokenCheckpoint, match="no such folder"):
        load_model("nothing")


def test_end_tokens_come_from_the_generation_config_first(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert ModelConfig.from_checkpoint(folder).eos_token_ids == (3, 7)
