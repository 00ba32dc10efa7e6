"""One function per architecture: the keys it understands, and the decoder they describe.

Whatever a function did not read is refused by `Options`, because an ignored option is a wrong model. To add a family,
add its function and its name in `FAMILIES`, and a configuration in tests/parity/families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock_core.models.config import (
    Activation,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
    token_ids,
)
from penstock_core.models.config_options import Options, declared_length, head_dim_of, one_rope, read_rope
from penstock_core.models.errors import BrokenCheckpoint, UnsupportedModel


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Map the content of a config.json.

    Raises:
        BrokenCheckpoint: it lacks a key or contradicts itself.
        UnsupportedModel: the architecture, or an option of it, is not supported.
    """
    architectures = raw.get("architectures") or []
    name = architectures[0] if architectures else f"model_type {raw.get('model_type')!r}"
    family = FAMILIES.get(name)
    if family is None:
        raise UnsupportedModel(f"architecture {name} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    options = Options(name, raw)
    config = family(options)
    options.refuse_the_rest()
    return config


def _activation(options: Options, key: str = "hidden_act") -> Activation:
    names: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    name = options.get(key, "silu")
    if name not in names:
        options.refuse(f"{key} = {name!r}", f"supported: {', '.join(names)}")
    return names[name]


def _same_layers(
    options: Options, rope: RopeConfig | None, window: int | None = None, experts: ExpertsConfig | None = None
) -> tuple[LayerConfig, ...]:
    """Layers that differ only where `layer_types` says that some slide and some see everything."""
    count = int(options.need("num_hidden_layers"))
    kinds = options.get("layer_types") or ["full_attention" if window is None else "sliding_attention"] * count
    return tuple(LayerConfig(w, rope, experts) for w in _windows(options, kinds, window))


def _windows(options: Options, kinds: list[str], window: int | None) -> list[int | None]:
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


def _decoder(options: Options, layers: tuple[LayerConfig, ...], **overrides: Any) -> ModelConfig:
    """What every family shares."""
    heads = int(options.need("num_attention_heads"))
    kv_heads = int(options.get("num_key_value_heads", heads))
    if heads % kv_heads:
        raise BrokenCheckpoint(f"config.json: num_attention_heads {heads} is not a multiple of {kv_heads} KV heads")
    head_dim = head_dim_of(options)
    reaches = [declared_length(layer.rope) for layer in layers if layer.rope is not None]
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
        "eos_token_ids": token_ids(options.get("eos_token_id")),
        "dtype": str(options.get("dtype", options.get("torch_dtype", "float32"))).removeprefix("torch."),
    }
    options.get("torch_dtype")
    if "activation" not in overrides:
        fields["activation"] = _activation(options)
    return ModelConfig(**(fields | overrides))


def _llama(options: Options) -> ModelConfig:
    bias = bool(options.get("attention_bias", False))
    return _decoder(
        options,
        _same_layers(options, one_rope(options)),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(options.get("mlp_bias", False)),
    )


def _mistral(options: Options) -> ModelConfig:
    return _decoder(options, _same_layers(options, one_rope(options), options.get("sliding_window")))


def _qwen2_windows(options: Options) -> tuple[LayerConfig, ...]:
    """Qwen slides only where use_sliding_window is set, and then in the layers from max_window_layers on."""
    rope = one_rope(options)
    window = options.get("sliding_window") if options.get("use_sliding_window", False) else None
    first = options.get("max_window_layers", 28)
    kinds = options.get("layer_types")
    if kinds is not None:
        return tuple(LayerConfig(w, rope, None) for w in _windows(options, kinds, window))
    return tuple(
        LayerConfig(window if i >= first else None, rope, None) for i in range(options.need("num_hidden_layers"))
    )


def _qwen2(options: Options) -> ModelConfig:
    return _decoder(options, _qwen2_windows(options), qkv_bias=True)


def _qwen3(options: Options) -> ModelConfig:
    bias = bool(options.get("attention_bias", False))
    return _decoder(options, _qwen2_windows(options), qkv_bias=bias, attention_output_bias=bias, qk_norm="head")


def _qwen3_moe(options: Options) -> ModelConfig:
    rope = one_rope(options)
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


def _mixtral(options: Options) -> ModelConfig:
    experts = ExpertsConfig(
        num_experts=options.need("num_local_experts"),
        experts_per_token=options.need("num_experts_per_tok"),
        intermediate_size=options.need("intermediate_size"),
        renormalize=True,
    )
    rope = one_rope(options, default_theta=1_000_000.0)
    return _decoder(options, _same_layers(options, rope, options.get("sliding_window"), experts))


def _phi3(options: Options) -> ModelConfig:
    rope = one_rope(options)
    options.get("original_max_position_embeddings")
    return _decoder(options, _same_layers(options, rope, options.get("sliding_window")))


def _olmo2(options: Options) -> ModelConfig:
    bias = bool(options.get("attention_bias", False))
    return _decoder(
        options,
        _same_layers(options, one_rope(options)),
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm="projection",
        norm_placement="after",
    )


def _gemma(options: Options, layers: tuple[LayerConfig, ...], **overrides: Any) -> ModelConfig:
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


def _alternating(options: Options, period: int) -> list[str]:
    """`layer_types`, or the family's default: every `period`-th layer sees everything."""
    count = options.need("num_hidden_layers")
    default = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)]
    kinds: list[str] = options.get("layer_types", default)
    return kinds


def _gemma2(options: Options) -> ModelConfig:
    rope = one_rope(options)
    windows = _windows(options, _alternating(options, 2), options.get("sliding_window", 4096))
    layers = tuple(LayerConfig(window, rope, None) for window in windows)
    return _gemma(options, layers, attention_softcap=options.get("attn_logit_softcapping"))


def _gemma3(options: Options) -> ModelConfig:
    options.only("attn_logit_softcapping")  # transformers' Gemma 3 declares it and does not apply it
    kinds = _alternating(options, options.get("sliding_window_pattern", options.get("_sliding_window_pattern", 6)))
    options.get("_sliding_window_pattern")
    windows = _windows(options, kinds, options.get("sliding_window", 4096))
    nested = options.get("rope_parameters", {})
    whole = {**(options.get("rope_scaling") or {}), **(nested.get("full_attention") or {})}
    head_dim = int(options.get("head_dim", 256))
    ropes = {
        "full_attention": read_rope(options, whole, options.get("rope_theta", 1_000_000.0), head_dim),
        "sliding_attention": read_rope(
            options, nested.get("sliding_attention") or {}, options.get("rope_local_base_freq", 10_000.0), head_dim
        ),
    }
    layers = tuple(LayerConfig(window, ropes[kind], None) for window, kind in zip(windows, kinds, strict=True))
    # Its linear rope factor is already counted in max_position_embeddings.
    return _gemma(options, layers, qk_norm="head", max_position=int(options.need("max_position_embeddings")))


def _smollm3(options: Options) -> ModelConfig:
    rope = one_rope(options, default_theta=2_000_000.0)
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


FAMILIES: dict[str, Callable[[Options], ModelConfig]] = {
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
