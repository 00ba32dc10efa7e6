"""The decoder: one class for every family, shaped by `ModelConfig`.

A forward pass takes the step's flattened tokens and the layers' pages and returns hidden states; logits are asked for
separately, for the rows that will be sampled. The residual stream and what a block adds to it are carried apart, so
that adding and norming are one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock_core.attention import AttentionBatch, AttentionSpec, HeadShape, LayerPages, PagedAttention
from penstock_core.kernels import native, rows
from penstock_core.kernels.decoder import DecoderShape, LayerParts, WholeDecoder
from penstock_core.kernels.linear import FloatProduct, Int8Product
from penstock_core.models import products
from penstock_core.models.config import LayerConfig, ModelConfig, RopeConfig
from penstock_core.models.layers import (
    MLP,
    BuildContext,
    Linear,
    MixtureOfExperts,
    RMSNorm,
    RowParallelLinear,
    Rows,
    SplitRMSNorm,
    VocabularyEmbedding,
    VocabularyHead,
)
from penstock_core.models.rope import RopeTable


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one forward pass share."""

    plan: Any  # the attention implementation's own
    slots: Tensor  # int64 [T]: where each token's key and value go
    rotations: dict[RopeConfig, rows.Rotation]


class Attention:
    """Self-attention of one layer over its pages. [T, hidden] -> [T, hidden]."""

    def __init__(self, context: BuildContext, module: str, layer: LayerConfig, attention: PagedAttention) -> None:
        config, group = context.config, context.group
        dim = config.head_dim
        q, kv = group.share(config.num_heads), group.kv_heads(config.num_kv_heads)
        self._shape = rows.HeadShape(q.stop - q.start, kv.stop - kv.start, dim)
        self._eps = config.norm_eps
        self._attention = attention
        self._spec = AttentionSpec(config.attention_scale, layer.window, config.attention_softcap)
        self._rope = layer.rope
        self._qkv = Linear(context, _qkv_rows(context, module, q, kv), config.hidden_size, bias=config.qkv_bias)
        self._output = RowParallelLinear(
            context,
            f"{module}.o_proj",
            config.hidden_size,
            config.num_heads * dim,
            bias=config.attention_output_bias,
        )
        self._norms: tuple[RMSNorm, RMSNorm] | None = None
        self._projection_norms: tuple[RMSNorm, RMSNorm] | None = None
        if config.qk_norm == "head":
            self._norms = RMSNorm(context, f"{module}.q_norm", dim), RMSNorm(context, f"{module}.k_norm", dim)
        elif config.qk_norm == "projection":
            q_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
            self._projection_norms = (
                SplitRMSNorm(context, f"{module}.q_norm", q_size, _scaled(q, dim)),
                SplitRMSNorm(context, f"{module}.k_norm", kv_size, _scaled(kv, dim)),
            )

    def __call__(self, x: Tensor, step: _Step, pages: LayerPages) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        qkv = self._qkv(x)
        if self._projection_norms is not None:
            qkv = self._norm_projections(qkv, *self._projection_norms)
        rotation = None if self._rope is None else step.rotations[self._rope]
        q = rows.rotate_and_store(qkv, self._shape, rotation, pages, step.slots, self._head_norms(), self._eps)
        out = self._attention.attend(q, pages, step.plan, self._spec)
        return self._output(out.flatten(1))

    def in_place(self, pages: LayerPages, dtype: torch.dtype) -> bool:
        """Whether a step of one token per sequence reads its pages without the host's help."""
        shape = HeadShape(dtype, pages.k.device, self._shape.heads, self._shape.dim)
        return self._attention.in_place(shape, pages, self._spec, decoding=True)

    def parts(self) -> tuple[products.Product, products.Product, tuple[Tensor, Tensor] | None]:
        """Its products, and the weights of the norms of queries and keys."""
        norms = self._norms or self._projection_norms
        return self._qkv.product, self._output.product, None if norms is None else (norms[0].weight, norms[1].weight)

    def _head_norms(self) -> tuple[Tensor, Tensor] | None:
        return None if self._norms is None else (self._norms[0].weight, self._norms[1].weight)

    def _norm_projections(self, qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> Tensor:
        """Norm all queries together, and all keys."""
        q_size, kv_size = self._shape.heads * self._shape.dim, self._shape.kv_heads * self._shape.dim
        q, k, v = torch.split(qkv, [q_size, kv_size, kv_size], -1)
        return torch.cat([q_norm(q.contiguous()), k_norm(k.contiguous()), v], -1)


def _scaled(heads: slice, dim: int) -> slice:
    return slice(heads.start * dim, heads.stop * dim)


def _qkv_rows(context: BuildContext, module: str, q: slice, kv: slice) -> list[Rows]:
    """This rank's query, key and value rows, from three stored linears or from one (Phi-3)."""
    config = context.config
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q, kv = _scaled(q, config.head_dim), _scaled(kv, config.head_dim)
    if context.plan.has(f"{module}.qkv_proj.weight"):
        fused, stored = f"{module}.qkv_proj", q_size + 2 * kv_size
        return [
            Rows(fused, stored, q),
            Rows(fused, stored, slice(q_size + kv.start, q_size + kv.stop)),
            Rows(fused, stored, slice(q_size + kv_size + kv.start, q_size + kv_size + kv.stop)),
        ]
    return [
        Rows(f"{module}.q_proj", q_size, q),
        Rows(f"{module}.k_proj", kv_size, kv),
        Rows(f"{module}.v_proj", kv_size, kv),
    ]


class DecoderLayer:
    """Attention and feed-forward, each with its norm before, after or around it."""

    def __init__(self, context: BuildContext, module: str, layer: LayerConfig, attention: PagedAttention) -> None:
        config = context.config
        size = config.hidden_size
        self._attention = Attention(context, f"{module}.self_attn", layer, attention)
        self._mlp = (
            MLP(context, f"{module}.mlp") if layer.experts is None else MixtureOfExperts(context, module, layer.experts)
        )
        names: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
            "before": ("input_layernorm", None, "post_attention_layernorm", None),
            "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
            "around": (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
        }
        self._window, self._norm_projections = layer.window, config.qk_norm == "projection"
        norms = [
            None if name is None else RMSNorm(context, f"{module}.{name}", size)
            for name in names[config.norm_placement]
        ]
        self._before_attention, self._after_attention, self._before_mlp, self._after_mlp = norms

    def __call__(self, residual: Tensor, delta: Tensor | None, step: _Step, pages: LayerPages) -> Tensor:
        """Add `delta` to the residual stream, in place, and return what this layer's MLP adds. All [T, hidden]."""
        x = _enter(residual, delta, self._before_attention)
        x = _leave(self._attention(x, step, pages), self._after_attention)
        x = _enter(residual, x, self._before_mlp)
        return _leave(self._mlp(x), self._after_mlp)

    def capturable(self, pages: LayerPages, dtype: torch.dtype) -> bool:
        """Whether nothing in a step of one token per sequence asks the host; a mixture of experts does."""
        return isinstance(self._mlp, MLP) and self._attention.in_place(pages, dtype)

    def parts(self, rope: RopeTable | None) -> LayerParts | None:
        """What the layer is made of, if the whole-decoder kernel knows all of it."""
        if not isinstance(self._mlp, MLP):
            return None
        qkv, output, head_norms = self._attention.parts()
        gate_up, down = self._mlp.products
        by_kernel = FloatProduct | Int8Product
        if not (
            isinstance(qkv, by_kernel)
            and isinstance(output, by_kernel)
            and isinstance(gate_up, by_kernel)
            and isinstance(down, by_kernel)
        ):
            return None
        norms = self._before_attention, self._after_attention, self._before_mlp, self._after_mlp
        weights = [None if norm is None else norm.weight for norm in norms]
        return LayerParts(
            qkv,
            output,
            gate_up,
            down,
            norms=(weights[0], weights[1], weights[2], weights[3]),
            head_norms=head_norms,
            norm_projections=self._norm_projections,
            window=self._window,
            rope=None if rope is None else rope.rows,
        )


def _enter(residual: Tensor, delta: Tensor | None, norm: RMSNorm | None) -> Tensor:
    """Add what the last block gave to the residual stream, and norm it for the next."""
    if delta is None:
        return residual if norm is None else norm(residual)
    if norm is None:
        residual += delta
        return residual
    return norm.add(residual, delta)


def _leave(x: Tensor, norm: RMSNorm | None) -> Tensor:
    return x if norm is None else norm(x)


class DecoderModel:
    """A loaded model. Stateless: everything a sequence leaves behind is in the pages.

    Attributes:
        whole: runs all layers in one call; None where the C kernels cannot.
    """

    def __init__(self, context: BuildContext, attention: PagedAttention) -> None:
        self.config: ModelConfig = context.config
        self.device = context.device
        self.dtype = context.dtype
        self.group = context.group
        self.stage = stage = context.stage
        self._attention = attention
        mine = stage.layers(self.config.num_layers)
        tied = self.config.tie_embeddings
        self._embedding: VocabularyEmbedding  # where tokens go in, and where it is the head
        self._norm: RMSNorm  # where logits come out, as the head
        self._head: VocabularyHead
        if stage.is_first or (stage.is_last and tied):
            self._embedding = VocabularyEmbedding(context, "model.embed_tokens")
        self._layers = [
            DecoderLayer(context, f"model.layers.{index}", self.config.layers[index], attention) for index in mine
        ]
        if stage.is_last:
            self._norm = RMSNorm(context, "model.norm", self.config.hidden_size)
            self._head = VocabularyHead(context, "lm_head", self._embedding if tied else None)
        self._ropes = {
            rope: RopeTable(rope, context.device)
            for rope in {layer.rope for layer in self.config.layers if layer.rope is not None}
        }
        if stage.count > 1:
            for index in set(range(self.config.num_layers)).difference(mine):
                context.plan.elsewhere(f"model.layers.{index}.")
            for module in ("model.embed_tokens", "model.norm", "lm_head"):
                context.plan.elsewhere(f"{module}.")
        self.whole: WholeDecoder | None = None
        context.plan.ignore("rotary_emb.inv_freq")  # a buffer that old checkpoints carry

    def finish_loading(self) -> None:
        """Prepare what could not be prepared tensor by tensor."""
        if self.stage.is_last:
            self._head.finish()
        self.whole = self._as_a_whole() if self.stage.count == 1 else None

    def _as_a_whole(self) -> WholeDecoder | None:
        """The whole-decoder kernel for this model; None where some part of it is not the kernels' own."""
        kernels, head, embedding = native.kernels(), self._head.product, self._embedding.weight
        if (
            kernels is None
            or self.group.size > 1
            or self.device.type != "cpu"
            or self.dtype != torch.float32
            or not isinstance(head, FloatProduct | Int8Product)
            or native.stored_type(embedding.dtype) is None
        ):
            return None
        layers = []
        for described, layer in zip(self.config.layers, self._layers, strict=True):
            parts = layer.parts(None if described.rope is None else self._ropes[described.rope])
            if parts is None:
                return None
            layers.append(parts)
        config = self.config
        shape = DecoderShape(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            dim=config.head_dim,
            intermediate=config.intermediate_size,
            gelu=config.activation == "gelu_tanh",
            embed_scale=self._embedding.scale,
            eps=config.norm_eps,
            attention_scale=config.attention_scale,
            softcap=config.attention_softcap or 0.0,
        )
        return WholeDecoder(kernels, shape, layers, embedding, self._norm.weight, head)

    def capturable(self, pages: Sequence[LayerPages]) -> bool:
        """Whether a step of one token per sequence can be captured in a CUDA graph."""
        return all(layer.capturable(own, self.dtype) for layer, own in zip(self._layers, pages, strict=True))

    @property
    def num_local_heads(self) -> int:
        """Query heads of this rank."""
        heads = self.group.share(self.config.num_heads)
        return int(heads.stop - heads.start)

    @property
    def num_local_kv_heads(self) -> int:
        """KV heads that this rank's pages hold."""
        heads = self.group.kv_heads(self.config.num_kv_heads)
        return int(heads.stop - heads.start)

    @property
    def num_local_layers(self) -> int:
        """Layers of this stage."""
        return len(self._layers)

    @torch.inference_mode()
    def forward(self, batch: AttentionBatch, pages: Sequence[LayerPages], hidden: Tensor | None = None) -> Tensor:
        """Run one step: writes the new tokens' keys and values to the pages. -> hidden states [T, hidden].

        Args:
            batch: the step.
            pages: of this stage's layers.
            hidden: what the stage before returned, and may be changed; None on the first, which embeds the tokens.
        """
        if self.whole is not None and self._attention.by_kernel(batch) and self.whole.bind(pages, batch.max_seq_len):
            return self.whole.forward(batch)
        step = _Step(
            self._attention.plan(batch),
            batch.slot_mapping,
            {
                rope: rows.Rotation(table.rows(batch.max_seq_len), batch.positions)
                for rope, table in self._ropes.items()
            },
        )
        residual = self._embedding(batch.token_ids) if hidden is None else hidden
        delta: Tensor | None = None
        for layer, layer_pages in zip(self._layers, pages, strict=True):
            delta = layer(residual, delta, step, layer_pages)
        return _enter(residual, delta, self._norm if self.stage.is_last else None)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of some hidden states of the last stage. [R, hidden] -> float32 [R, vocab], see VocabularyHead."""
        return self._head(hidden)
