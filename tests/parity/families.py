"""One small configuration per supported family and per feature worth its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.parity.checkpoints import SHAPE

ORIGINAL = {"original_max_position_embeddings": 32}
MOE = {"num_experts_per_tok": 2}


def _llama(**options: Any) -> Any:
    return transformers.LlamaConfig(**{**SHAPE, **options})


def _rope(**parameters: Any) -> Any:
    return _llama(rope_parameters={"rope_theta": 10_000.0, **parameters})


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(tie_word_embeddings=True),
    "llama, biased, wide heads": lambda: _llama(attention_bias=True, mlp_bias=True, head_dim=32),
    "llama, one KV head": lambda: _llama(num_key_value_heads=1),
    "llama 3 rope": lambda: _rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL
    ),
    "linear rope": lambda: _rope(rope_type="linear", factor=4.0),
    "dynamic rope": lambda: _rope(rope_type="dynamic", factor=2.0),
    "yarn rope": lambda: _rope(rope_type="yarn", factor=4.0, **ORIGINAL),
    "yarn rope, every option": lambda: _rope(
        rope_type="yarn", factor=4.0, beta_fast=16, beta_slow=2, mscale=0.7, mscale_all_dim=0.4, truncate=False,
        **ORIGINAL,
    ),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None, head_dim=16),
    "mistral, sliding": lambda: transformers.MistralConfig(**SHAPE, sliding_window=7),
    "qwen 2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen 2, sliding": lambda: transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen 3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32),
    "qwen 3 moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, **MOE, head_dim=16, num_experts=6, moe_intermediate_size=40, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "qwen 3 moe, raw weights": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, **MOE, head_dim=16, num_experts=6, moe_intermediate_size=40, norm_topk_prob=False
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, **MOE, num_local_experts=5),
    "phi 3": lambda: transformers.Phi3Config(**SHAPE),
    "phi 3, sliding, partly rotated": lambda: transformers.Phi3Config(
        **SHAPE, sliding_window=6, rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    ),
    "olmo 2": lambda: transformers.Olmo2Config(**SHAPE),
    "gemma 2": lambda: transformers.Gemma2Config(
        **SHAPE, head_dim=16, sliding_window=6, query_pre_attn_scalar=24, attn_logit_softcapping=4.0,
        final_logit_softcapping=9.0,
    ),
    "gemma 3": lambda: transformers.Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 7}, head_dim=16, sliding_window=6, query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "smollm 3": lambda: transformers.SmolLM3Config(**{**SHAPE, "num_hidden_layers": 4}),
}  # fmt: skip
