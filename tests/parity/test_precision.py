"""Lower precisions stay close to float32, and checkpoints in every dtype and layout load to the same model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from penstock_core.models import load_model
from tests.parity.checkpoints import logits_of, write_checkpoint
from tests.parity.families import CONFIGS

pytestmark = pytest.mark.parity

PROMPTS = [[5, 9, 100, 3, 7, 7, 20, 44, 2, 100, 17, 180, 6, 61, 90], [150, 8], [33, 12, 99]]


def errors(folder: Path, **arguments: str) -> torch.Tensor:
    """Relative logit error per position against float32."""
    whole = torch.cat(logits_of(load_model(folder, dtype="float32"), PROMPTS))
    lower = torch.cat(logits_of(load_model(folder, **arguments), PROMPTS))  # type: ignore[arg-type]
    return (lower - whole).norm(dim=-1) / whole.norm(dim=-1)


@pytest.mark.parametrize("family", ["llama", "qwen 3", "gemma 2", "mixtral", "olmo 2"])
@pytest.mark.parametrize(
    ("arguments", "bound"),
    [({"dtype": "bfloat16"}, 0.06), ({"dtype": "float16"}, 0.01), ({"quantization": "int8"}, 0.08)],
    ids=["bfloat16", "float16", "int8"],
)
def test_lower_precision_stays_close(family: str, arguments: dict[str, str], bound: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS[family]())
    assert errors(tmp_path, **arguments).median() < bound


def test_int8_rows_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    """An outlier in one request once cost the others 20 % where a scale was shared by the whole batch."""
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    model = load_model(tmp_path, quantization="int8")
    together = logits_of(model, PROMPTS)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(logits_of(model, [prompt])[0], expected, rtol=1e-4, atol=1e-4)


def test_sharded_checkpoints_load_to_the_same_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", CONFIGS["qwen 2"]())
    write_checkpoint(tmp_path / "many", CONFIGS["qwen 2"](), max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (logits_of(load_model(tmp_path / name), PROMPTS) for name in ("one", "many"))
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a, b)


def test_half_precision_checkpoints_are_widened(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "whole", CONFIGS["llama"]())
    model.half().save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "rounded")
    half, rounded = (logits_of(load_model(tmp_path / name), PROMPTS) for name in ("half", "rounded"))
    for a, b in zip(half, rounded, strict=True):
        assert torch.equal(a, b)


def test_experts_stacked_in_one_tensor_load_to_the_same_model(tmp_path: Path) -> None:
    """transformers 5 holds experts stacked; checkpoints exist in both layouts."""
    write_checkpoint(tmp_path / "apart", CONFIGS["qwen 3 moe"]())
    tensors = load_file(tmp_path / "apart" / "model.safetensors")
    for layer in (0, 2):
        experts = f"model.layers.{layer}.mlp.experts"
        parts = {
            kind: torch.stack([tensors.pop(f"{experts}.{index}.{kind}_proj.weight") for index in range(6)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{experts}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        tensors[f"{experts}.down_proj"] = parts["down"]
    (tmp_path / "stacked").mkdir()
    save_file(tensors, tmp_path / "stacked" / "model.safetensors")
    shutil.copy(tmp_path / "apart" / "config.json", tmp_path / "stacked")
    apart, stacked = (logits_of(load_model(tmp_path / name), PROMPTS) for name in ("apart", "stacked"))
    for a, b in zip(apart, stacked, strict=True):
        assert torch.equal(a, b)


def test_tensors_of_mixed_dtypes_meet_in_float32(tmp_path: Path) -> None:
    """A merged projection whose parts are stored differently must not round one part to the other's dtype."""
    write_checkpoint(tmp_path, CONFIGS["llama"]())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        dtype = torch.float16 if "q_proj" in name else torch.bfloat16 if "k_proj" in name else torch.float32
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)
    mixed = logits_of(load_model(tmp_path), PROMPTS)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, file)
    for a, b in zip(mixed, logits_of(load_model(tmp_path), PROMPTS), strict=True):
        assert torch.equal(a, b)


def test_loading_never_holds_two_copies(tmp_path: Path) -> None:
    """Peak memory while loading is the packed weights and little more; the system's own file pages are not counted."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    program = """
import sys, torch
from penstock_core.models import load_model
def anonymous(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
torch.set_num_threads(1)
before, peak = anonymous("RssAnon"), 0
def watch(done, total):
    global peak
    peak = max(peak, anonymous("RssAnon"))
model = load_model(sys.argv[1], progress=watch)
print(peak - before)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5 * size
