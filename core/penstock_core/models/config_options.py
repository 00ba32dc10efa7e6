"""The keys of one config.json, read by name: what nobody read and is not known to be harmless is refused.

Reads the rope options of both transformers 4 (`rope_theta`, `rope_scaling`) and transformers 5 (`rope_parameters`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock_core.models.config import RopeConfig, RopeKind
from penstock_core.models.errors import BrokenCheckpoint, UnsupportedModel

# Keys that do not change what a trained decoder computes: provenance, training and generation defaults.
_HARMLESS = frozenset(
    """
    architectures model_type transformers_version _name_or_path auto_map use_cache initializer_range
    attention_dropout hidden_dropout resid_pdrop embd_pdrop dropout output_router_logits router_aux_loss_coef
    router_jitter_noise output_attentions output_hidden_states return_dict return_dict_in_generate is_encoder_decoder
    is_decoder gradient_checkpointing pretraining_tp chunk_size_feed_forward id2label label2id problem_type
    finetuning_task task_specific_params _attn_implementation attn_implementation cache_implementation
    use_bfloat16 max_window_layers tokenizer_class prefix decoder_start_token_id sep_token_id cls_token_id
    unsloth_version unsloth_fixed _attn_implementation_autoset transformers.js_config
    """.split()  # noqa: SIM905
)


class Options:
    """The keys of one config.json, remembering which were read."""

    def __init__(self, architecture: str, raw: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self._raw = raw
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value, or the default where it is absent or null."""
        self._read.add(key)
        value = self._raw.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """A key's value; its absence is an error, because no default fits every checkpoint of a family."""
        value = self.get(key)
        if value is None:
            raise BrokenCheckpoint(f"config.json: {self.architecture} needs {key}, which is missing")
        return value

    def only(self, key: str, *accepted: Any) -> None:
        """Refuse any value but these; absent is accepted."""
        value = self.get(key)
        if value is not None and value not in accepted:
            self.refuse(f"{key} = {value!r}", f"supported: {', '.join(map(repr, accepted)) or 'absent'}")

    def refuse(self, what: str, remedy: str) -> None:
        """Raise UnsupportedModel naming the option."""
        raise UnsupportedModel(f"config.json: {self.architecture} with {what} is not supported; {remedy}")

    def refuse_the_rest(self) -> None:
        """Refuse options nobody read, unless they are harmless or switched off."""
        if self._raw.get("quantization_config"):
            method = self._raw["quantization_config"].get("quant_method", "an unnamed method")
            self.refuse(f"quantization_config ({method})", "use the unquantised checkpoint, and --quantization int8")
        for key in sorted(self._raw.keys() - self._read - _HARMLESS):
            if self._raw[key] not in (None, False, 0, "", [], {}):
                self.refuse(f"{key} = {self._raw[key]!r}", "Penstock does not know this option and will not guess")


_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_KEYS = frozenset(
    """
    rope_type type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings beta_fast
    beta_slow attention_factor mscale mscale_all_dim truncate partial_rotary_factor
    """.split()  # noqa: SIM905
)


def read_rope(options: Options, raw: Mapping[str, Any], theta: float, head_dim: int) -> RopeConfig:
    """One rope dictionary, of either transformers generation; `theta` and the config's own keys are its defaults."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in _ROPE_KINDS:
        options.refuse(f"rope type {kind!r}", f"supported: {', '.join(_ROPE_KINDS)}")
    unknown = [key for key in raw.keys() - _ROPE_KEYS if raw[key] is not None]
    if unknown:
        options.refuse(f"rope option {sorted(unknown)[0]!r}", "Penstock does not know this option and will not guess")
    max_position = int(options.need("max_position_embeddings"))
    fraction = raw.get("partial_rotary_factor", options.get("partial_rotary_factor", 1.0))
    original = options.get("original_max_position_embeddings") if kind in ("llama3", "yarn") else None
    original = original or raw.get("original_max_position_embeddings") or max_position
    factor = raw.get("factor")
    if factor is None:
        if kind not in ("default", "yarn"):
            options.refuse(f"rope type {kind!r} without a factor", "add rope_scaling.factor")
        factor = max_position / original if kind == "yarn" else 1.0
    config = RopeConfig(
        kind=kind,
        theta=float(raw.get("rope_theta") or theta),
        rotary_dim=int(head_dim * fraction),
        max_position=max_position,
        original_max_position=int(original),
        factor=float(factor),
        beta_fast=float(raw.get("beta_fast") or 32.0),
        beta_slow=float(raw.get("beta_slow") or 1.0),
        attention_factor=raw.get("attention_factor"),
        mscale=raw.get("mscale"),
        mscale_all_dim=raw.get("mscale_all_dim"),
        truncate=raw.get("truncate", True),
    )
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            if raw.get(key) is None:
                options.refuse(f"rope type 'llama3' without {key}", f"add rope_scaling.{key}")
        config = replace(config, low_freq_factor=raw["low_freq_factor"], high_freq_factor=raw["high_freq_factor"])
    return config


def head_dim_of(options: Options) -> int:
    """Size of one head: stated, or what the heads divide the hidden size into."""
    return int(options.get("head_dim") or options.need("hidden_size") // options.need("num_attention_heads"))


def one_rope(options: Options, default_theta: float = 10_000.0) -> RopeConfig:
    """The rope of a family whose layers all share one."""
    raw = {**(options.get("rope_scaling") or {}), **(options.get("rope_parameters") or {})}
    return read_rope(options, raw, options.get("rope_theta", default_theta), head_dim_of(options))


def declared_length(rope: RopeConfig) -> int:
    """The context length the checkpoint declares: interpolated ropes count their factor on the trained length."""
    if rope.kind in ("linear", "dynamic"):
        return int(rope.max_position * rope.factor)
    if rope.kind == "yarn":
        return max(rope.max_position, int(rope.original_max_position * rope.factor))
    return rope.max_position
