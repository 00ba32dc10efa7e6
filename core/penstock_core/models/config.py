"""From a Hugging Face config.json to `ModelConfig`: everything the decoder must know, and nothing it does not.

Each family is one function that reads the keys it understands; whatever it did not read and is not known to be harmless
is refused by name, because an ignored option is a wrong model. Reads both transformers 4 (`rope_theta`,
`rope_scaling`) and transformers 5 (`rope_parameters`) files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from penstock_core.models.errors import BrokenCheckpoint, UnsupportedModel

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
                config = replace(config, eos_token_ids=_token_ids(generation["eos_token_id"]))
        return config

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Map the content of a config.json."""
        architectures = raw.get("architectures") or []
        name = architectures[0] if architectures else f"model_type {raw.get('model_type')!r}"
        family = FAMILIES.get(name)
        if family is None:
            raise UnsupportedModel(f"architecture {name} is not supported; supported: {', '.join(sorted(FAMILIES))}")
        options = _Options(name, raw)
        config = family(options)
        options.refuse_the_rest()
        return config


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


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


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


class _Options:
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


def _rope(options: _Options, raw: Mapping[str, Any], theta: float, head_dim: int) -> RopeConfig:
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


def _head_dim(options: _Options) -> int:
    return int(options.get("head_dim") or options.need("hidden_size") // options.need("num_attention_heads"))


def _one_rope(options: _Options, default_theta: float = 10_000.0) -> RopeConfig:
    """The rope of a family whose layers all share one."""
    raw = {**(options.get("rope_scaling") or {}), **(options.get("rope_parameters") or {})}
    return _rope(options, raw, options.get("rope_theta", default_theta), _head_dim(options))


def _reach(rope: RopeConfig) -> int:
    """The context length the checkpoint declares: interpolated ropes count their factor on the trained length."""
    if rope.kind in ("linear", "dynamic"):
        return int(rope.max_position * rope.factor)
    if rope.kind == "yarn":
        return max(rope.max_position, int(rope.original_max_position * rope.factor))
    return rope.max_position


def _activation(options: _Options, key: str = "hidden_act") -> Activation:
    names: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    name = options.get(key, "silu")
    if name not in names:
        options.refuse(f"{key} = {name!r}", f"supported: {', '.join(names)}")
    return names[name]


def _same_layers(
    options: _Options, rope: RopeConfig | None, window: int | None = None, experts: ExpertsConfig | None = None
) -> tuple[LayerConfig, ...]:
    """Layers that differ only where `layer_types` says that some slide and some see everything."""
    count = int(options.need("num_hidden_layers"))
    kinds = options.get("layer_types") or ["full_attention" if window is None else "sliding_attention"] * count
    return tuple(LayerConfig(w, rope, experts) for w in _windows(options, kinds, window))


def _windows(options: _Options, kinds: list[str], window: int | None) -> list[int | None]:
    """One attention window per layer, from `layer_types`."""
    if len(kinds) != options.need("num_hidden_layers"):
        raise BrokenCheckpoint(
            f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers {options.need('num_hidden_layers')}"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            options.refuse(f"layer type {kind!r}", "supported: full_attention, sliding_attention")
    if "sliding_attention" in kinds and window is None:
        raise BrokenCheckpoint("config.json: layer_types has sliding_attention but sliding_window is missing")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _decoder(options: _Options, layers: tuple[LayerConfig, ...], **overrides: Any) -> ModelConfig:
    """What every family shares."""
    heads = int(options.need("num_attention_heads"))
    kv_heads = int(options.get("num_key_value_heads", heads))
    if heads % kv_heads:
        raise BrokenCheckpoint(f"config.json: num_attention_heads {heads} is not a multiple of {kv_heads} KV heads")
    head_dim = _head_dim(options)
    reaches = [_reach(layer.rope) for layer in layers if layer.rope is not None]
    fields: dict[str, Any] = {
        "architecture": options.architecture,
        "vocab_size": int(options.need("vocab_size")),
        "hidden_size": int(options.need("hidden_size")),
        "intermediate_size": int(options.get("intermediate_size", 0)),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position": max(reaches, default=int(options.need("max_position_embeddings"))),
        "layers": layers,
        "norm_eps": float(options.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(options.get("tie_word_embeddings", False)),
        "attention_scale": head_dim**-0.5,
        "bos_token_id": options.get("bos_token_id"),
        "pad_token_id": options.get("pad_token_id"),
        "eos_token_ids": _token_ids(options.get("eos_token_id")),
        "dtype": str(options.get("dtype", options.get("torch_dtype", "float32"))).removeprefix("torch."),
    }
    options.get("torch_dtype")
    if "activation" not in overrides:
        fields["activation"] = _activation(options)
    return ModelConfig(**(fields | overrides))


def _llama(options: _Options) -> ModelConfig:
    bias = bool(options.get("attention_bias", False))
    return _decoder(
        options,
        _same_layers(options, _one_rope(options)),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(options.get("mlp_bias", False)),
    )


def _mistral(options: _Options) -> ModelConfig:
    return _decoder(options, _same_layers(options, _one_rope(options), options.get("sliding_window")))


def _qwen2_windows(options: _Options) -> tuple[LayerConfig, ...]:
    """Qwen slides only where use_sliding_window is set, and then in the layers from max_window_layers on."""
    rope = _one_rope(options)
    window = options.get("sliding_window") if options.get("use_sliding_window", False) else None
    first = options.get("max_window_layers", 28)
    kinds = options.get("layer_types")
    if kinds is not None:
        return tuple(LayerConfig(w, rope, None) for w in _windows(options, kinds, window))
    return tuple(
        LayerConfig(window if i >= first else None, rope, None) for i in range(options.need("num_hidden_layers"))
    )


def _qwen2(options: _Options) -> ModelConfig:
    return _decoder(options, _qwen2_windows(options), qkv_bias=True)


def _qwen3(options: _Options) -> ModelConfig:
    bias = bool(options.get("attention_bias", False))
    return _decoder(options, _qwen2_windows(options), qkv_bias=bias, attention_output_bias=bias, qk_norm="head")


def _qwen3_moe(options: _Options) -> ModelConfig:
    rope = _one_rope(options)
    window = options.get("sliding_window") if options.get("use_sliding_window", False) else None
    experts = ExpertsConfig(
        num_experts=options.get("num_experts") or options.need("num_local_experts"),
        experts_per_token=options.need("num_experts_per_tok"),
        intermediate_size=options.need("moe_intermediate_size"),
        renormalize=bool(options.get("norm_topk_prob", False)),
    )
    options.get("num_local_experts")
    dense = set(options.get("mlp_only_layers", []))
    step = options.get("decoder_sparse_step", 1)
    layers = tuple(
        LayerConfig(window, rope, experts if i not in dense and (i + 1) % step == 0 else None)
        for i in range(options.need("num_hidden_layers"))
    )
    bias = bool(options.get("attention_bias", False))
    return _decoder(options, layers, qkv_bias=bias, attention_output_bias=bias, qk_norm="head")


def _mixtral(options: _Options) -> ModelConfig:
    experts = ExpertsConfig(
        num_experts=options.need("num_local_experts"),
        experts_per_token=options.need("num_experts_per_tok"),
        intermediate_size=options.need("intermediate_size"),
        renormalize=True,
    )
    rope = _one_rope(options, default_theta=1_000_000.0)
    return _decoder(options, _same_layers(options, rope, options.get("sliding_window"), experts))


def _phi3(options: _Options) -> ModelConfig:
    rope = _one_rope(options)
    options.get("original_max_position_embeddings")
    return _decoder(options, _same_layers(options, rope, options.get("sliding_window")))


def _olmo2(options: _Options) -> ModelConfig:
    bias = bool(options.get("attention_bias", False))
    return _decoder(
        options,
        _same_layers(options, _one_rope(options)),
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm="projection",
        norm_placement="after",
    )


def _gemma(options: _Options, layers: tuple[LayerConfig, ...], **overrides: Any) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    bias = bool(options.get("attention_bias", False))
    options.only("use_bidirectional_attention", False)
    options.get("hidden_act")  # written beside hidden_activation in old files, and ignored by transformers
    return _decoder(
        options,
        layers,
        activation=_activation(options, "hidden_activation") if options.get("hidden_activation") else "gelu_tanh",
        tie_embeddings=bool(options.get("tie_word_embeddings", True)),
        attention_scale=float(options.get("query_pre_attn_scalar", 256)) ** -0.5,
        logit_softcap=options.get("final_logit_softcapping"),
        qkv_bias=bias,
        attention_output_bias=bias,
        norm_placement="around",
        norm_offset=1.0,
        embed_scale=float(options.need("hidden_size")) ** 0.5,
        **overrides,
    )


def _alternating(options: _Options, period: int) -> list[str]:
    """`layer_types`, or the family's default: every `period`-th layer sees everything."""
    count = options.need("num_hidden_layers")
    default = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)]
    kinds: list[str] = options.get("layer_types", default)
    return kinds


def _gemma2(options: _Options) -> ModelConfig:
    rope = _one_rope(options)
    windows = _windows(options, _alternating(options, 2), options.get("sliding_window", 4096))
    layers = tuple(LayerConfig(window, rope, None) for window in windows)
    return _gemma(options, layers, attention_softcap=options.get("attn_logit_softcapping"))


def _gemma3(options: _Options) -> ModelConfig:
    options.only("attn_logit_softcapping")  # transformers' Gemma 3 declares it and does not apply it
    kinds = _alternating(options, options.get("sliding_window_pattern", options.get("_sliding_window_pattern", 6)))
    options.get("_sliding_window_pattern")
    windows = _windows(options, kinds, options.get("sliding_window", 4096))
    nested = options.get("rope_parameters", {})
    whole = {**(options.get("rope_scaling") or {}), **(nested.get("full_attention") or {})}
    head_dim = int(options.get("head_dim", 256))
    ropes = {
        "full_attention": _rope(options, whole, options.get("rope_theta", 1_000_000.0), head_dim),
        "sliding_attention": _rope(
            options, nested.get("sliding_attention") or {}, options.get("rope_local_base_freq", 10_000.0), head_dim
        ),
    }
    layers = tuple(LayerConfig(window, ropes[kind], None) for window, kind in zip(windows, kinds, strict=True))
    # Its linear rope factor is already counted in max_position_embeddings.
    return _gemma(options, layers, qk_norm="head", max_position=int(options.need("max_position_embeddings")))


def _smollm3(options: _Options) -> ModelConfig:
    rope = _one_rope(options, default_theta=2_000_000.0)
    count = options.need("num_hidden_layers")
    interval = options.get("no_rope_layer_interval", 4)
    rotated = options.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(count)])
    window = options.get("sliding_window") if options.get("use_sliding_window", False) else None
    kinds = options.get("layer_types") or [
        "sliding_attention" if window is not None and not has_rope else "full_attention" for has_rope in rotated
    ]
    layers = tuple(
        LayerConfig(w, rope if has_rope else None, None)
        for w, has_rope in zip(_windows(options, kinds, window), rotated, strict=True)
    )
    bias = bool(options.get("attention_bias", False))
    return _decoder(
        options,
        layers,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(options.get("mlp_bias", False)),
        tie_embeddings=bool(options.get("tie_word_embeddings", True)),
    )


FAMILIES: dict[str, Callable[[_Options], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "MixtralForCausalLM": _mixtral,
    "Phi3ForCausalLM": _phi3,
    "Olmo2ForCausalLM": _olmo2,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "SmolLM3ForCausalLM": _smollm3,
}
