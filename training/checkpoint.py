"""The two model shapes and how a checkpoint is written: Hugging Face layout, 16-bit safetensors, no pickle.

config.json carries both spellings of the settings that transformers renamed in version 5 (`rope_theta` and
`rope_parameters`, `torch_dtype` and `dtype`), so that readers of either kind find them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from training.markers import BOS, END, EOS, PAD
from training.tokenizer import VOCAB_SIZE, save_tokenizer

CONTEXT_TOKENS = 1024
ROPE_THETA = 10000.0


def main_config() -> LlamaConfig:
    """The main model: 1.97M parameters."""
    return _config(hidden=192, layers=4, heads=6, kv_heads=2, intermediate=512)


def draft_config() -> LlamaConfig:
    """The draft model: two layers, the fewest that can copy a name seen earlier in the text."""
    return _config(hidden=64, layers=2, heads=2, kv_heads=2, intermediate=192)


def _config(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def config_json(config: LlamaConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """config.json in the widespread flat form, with the newer spellings beside the older ones."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": [tokenizer.token_to_id(EOS), tokenizer.token_to_id(END)],
        "pad_token_id": tokenizer.token_to_id(PAD),
        "dtype": "float16",
        "torch_dtype": "float16",
        "use_cache": True,
    }


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model, configuration and tokenizer to `folder`. The tied output matrix is stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = config_json(model.config, tokenizer)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation |= {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder, CONTEXT_TOKENS)
