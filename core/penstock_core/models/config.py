"""From a Hugging Face config.json to `ModelConfig`: everything the decoder must know, and nothing it does not.

Plain data; `families` fills it in, one function per architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from penstock_core.models.errors import BrokenCheckpoint

Activation = Literal["silu", "gelu_tanh"]
NormPlacement = Literal["before", "after", "around"]
QKNorm = Literal["head", "projection"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One set of rotary frequencies. `original_max_position` is the length the model was first trained on."""

    kind: RopeKind
    theta: float
    rotary_dim: int
    max_position: int
    original_max_position: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP. `renormalize`: the chosen experts' weights are made to sum to one."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    renormalize: bool


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer: attention window, rotary frequencies (None for none), experts or one MLP."""

    window: int | None
    rope: RopeConfig | None
    experts: ExpertsConfig | None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder, completely described.

    Attributes:
        norm_placement: `before` attention and MLP (Llama), `after` them (OLMo 2), or `around` both (Gemma).
        norm_offset: added to every norm weight (Gemma stores weight - 1).
        qk_norm: RMS norm of queries and keys per `head`, or over the whole `projection` (OLMo 2); None for none.
        embed_scale: factor on embeddings.
        attention_scale: factor on attention scores.
        eos_token_ids: generation_config.json's where present, else config.json's.
        dtype: the checkpoint's own dtype, `float32`, `bfloat16` or `float16`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    activation: Activation
    tie_embeddings: bool
    attention_scale: float
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    norm_placement: NormPlacement = "before"
    norm_offset: float = 0.0
    qk_norm: QKNorm | None = None
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @classmethod
    def from_checkpoint(cls, path: Path) -> ModelConfig:
        """Read `config.json` (and `generation_config.json`, where present) of a checkpoint folder.

        Raises:
            BrokenCheckpoint: a file is missing or is not JSON.
            UnsupportedModel: the architecture, or an option of it, is not supported.
        """
        config = cls.from_dict(_read_json(path / "config.json"))
        if (path / "generation_config.json").exists():
            generation = _read_json(path / "generation_config.json")
            if generation.get("eos_token_id") is not None:
                config = replace(config, eos_token_ids=token_ids(generation["eos_token_id"]))
        return config

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Map the content of a config.json; raises as `from_checkpoint` does."""
        from penstock_core.models.families import read_config

        return read_config(raw)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{path}: no such file; a checkpoint folder needs config.json") from None
    except ValueError as error:
        raise BrokenCheckpoint(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """One id, several or none, as both generations of files write them."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
