"""The parts every decoder is built from: linears, norms, embedding, MLP and mixture of experts.

Each part declares in its constructor which checkpoint tensors it is made of; calling it computes. T is the number of
tokens in the step. Merged projections (q, k and v; gate and up) are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock_core.kernels import rows
from penstock_core.models import products
from penstock_core.models.config import Activation, ExpertsConfig, ModelConfig
from penstock_core.models.parallel import WHOLE_MODEL, Stage, TensorParallelGroup
from penstock_core.models.weights import WHOLE, Index, Piece, Weight, WeightPlan


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What every part needs while the model is built."""

    plan: WeightPlan
    config: ModelConfig
    group: TensorParallelGroup
    device: torch.device
    dtype: torch.dtype
    quantization: products.Quantization | None
    deterministic: bool
    stage: Stage = WHOLE_MODEL

    def weight(self, shape: tuple[int, ...], on_full: Callable[[Tensor], None], dtype: torch.dtype) -> Weight:
        """A weight on the model's device."""
        return Weight(shape, dtype, self.device, on_full)

    def linear_weight(self, shape: tuple[int, ...], on_full: Callable[[Tensor], None]) -> Weight:
        """A weight for `prepare`, in whatever dtype it wants."""
        dtype = products.stored_dtype(self.dtype, self.device, self.quantization)
        return Weight(shape, dtype, self.device, on_full)

    def prepare(self, weight: Tensor, bias: Tensor | None) -> products.Product:
        """How to multiply by a weight."""
        return products.prepare(weight, bias, self.dtype, self.quantization, self.deterministic)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some output rows of a linear: the module that stores them, how many rows it stores, and which are wanted.

    `expert`: the module stores one matrix per expert, stacked; this one's index (and `experts`, their number).
    """

    module: str
    stored: int
    take: slice
    expert: int | None = None
    experts: int = 0

    def __len__(self) -> int:
        return int(self.take.stop - self.take.start)


class Linear:
    """One matrix product over the outputs of one or several stored linears. [T, in] -> [T, out]."""

    def __init__(
        self,
        context: BuildContext,
        parts: Sequence[Rows],
        in_features: int,
        *,
        columns: slice | None = None,
        bias: bool = False,
        add_bias: bool = True,
    ) -> None:
        """`columns`: which inputs this rank holds. `add_bias`: false on the ranks that must not add it again."""
        self._prepare = context.prepare
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._biased = bias and add_bias
        self._product: products.Product
        columns = columns or slice(0, in_features)
        out_features = sum(map(len, parts))
        weight = context.linear_weight((out_features, columns.stop - columns.start), self._set_weight)
        bias_weight = context.weight((out_features,), self._set_bias, context.dtype) if self._biased else None
        start = 0
        for part in parts:
            target = slice(start, start + len(part))
            start = target.stop
            if part.expert is None:
                piece = Piece((part.take, columns), weight, (target,))
                context.plan.expect(f"{part.module}.weight", (part.stored, in_features), piece)
            else:
                piece = Piece((part.expert, part.take, columns), weight, (target,))
                context.plan.expect(part.module, (part.experts, part.stored, in_features), piece)
            if bias:
                pieces = [Piece((part.take,), bias_weight, (target,))] if bias_weight else []
                context.plan.expect(f"{part.module}.bias", (part.stored,), *pieces)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self._product(x)

    @property
    def product(self) -> products.Product:
        """What a call multiplies by."""
        return self._product

    def _set_weight(self, weight: Tensor) -> None:
        self._weight = weight
        self._prepare_if_full()

    def _set_bias(self, bias: Tensor) -> None:
        self._bias = bias
        self._prepare_if_full()

    def _prepare_if_full(self) -> None:
        if self._weight is not None and (self._bias is not None or not self._biased):
            self._product = self._prepare(self._weight, self._bias)
            self._weight = self._bias = None


class RowParallelLinear:
    """A linear whose inputs are split among ranks; the parts are summed. [T, in / ranks] -> [T, out]."""

    def __init__(
        self, context: BuildContext, module: str, out_features: int, in_features: int, *, bias: bool = False
    ) -> None:
        group = context.group
        rows = [Rows(module, out_features, slice(0, out_features))]
        columns = group.share(in_features)
        self._linear = Linear(context, rows, in_features, columns=columns, bias=bias, add_bias=group.rank == 0)
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in / ranks] -> [T, out]."""
        return self._group.all_reduce(self._linear(x))

    @property
    def product(self) -> products.Product:
        """This rank's part of the product."""
        return self._linear.product


class RMSNorm:
    """Root-mean-square norm; weights are kept in float32, with the family's offset already added."""

    def __init__(self, context: BuildContext, module: str, size: int, take: slice | None = None) -> None:
        """`take`: the part of the weight this rank needs, where the normed dimension is split."""
        self._eps = context.config.norm_eps
        self._offset = context.config.norm_offset
        self.weight: Tensor
        take = take or slice(0, size)
        weight = context.weight((take.stop - take.start,), self._set, torch.float32)
        context.plan.expect(f"{module}.weight", (size,), Piece((take,), weight, (WHOLE,)))

    def _set(self, weight: Tensor) -> None:
        self.weight = weight + self._offset if self._offset else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[..., size] -> the same."""
        return rows.rms_norm(x, self.weight, self._eps)

    def add(self, residual: Tensor, delta: Tensor) -> Tensor:
        """`residual += delta`, and the norm of the sum."""
        return rows.add_rms_norm(residual, delta, self.weight, self._eps)


class SplitRMSNorm(RMSNorm):
    """A norm over a dimension split among ranks: each has a part of the row, and all need its whole mean square."""

    def __init__(self, context: BuildContext, module: str, size: int, take: slice) -> None:
        super().__init__(context, module, size, take)
        self._group = context.group
        self._size = (take.stop - take.start) * context.group.size  # what the sum counts: replicated heads repeat

    def __call__(self, x: Tensor) -> Tensor:
        """[T, size / ranks] -> the same."""
        if self._group.size == 1:
            return super().__call__(x)
        wide = x.float()
        squares = self._group.all_reduce(wide.square().sum(-1, keepdim=True))
        return (wide * torch.rsqrt(squares / self._size + self._eps) * self.weight).to(x.dtype)


class VocabularyEmbedding:
    """Token embeddings, split among ranks by token id. int64 [T] -> [T, hidden]."""

    def __init__(self, context: BuildContext, module: str) -> None:
        config = context.config
        self._group = context.group
        self._range = context.group.share(config.vocab_size)
        # Rounded to the model's dtype as transformers does: Gemma was trained with the rounded factor.
        self._scale = float(torch.tensor(config.embed_scale, dtype=context.dtype))
        self.weight: Tensor
        self._dtype = context.dtype
        weight = context.linear_weight((self._range.stop - self._range.start, config.hidden_size), self._set)
        piece = Piece((self._range, WHOLE), weight, (WHOLE,))
        context.plan.expect(f"{module}.weight", (config.vocab_size, config.hidden_size), piece)

    def _set(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def scale(self) -> float:
        """Factor on the embeddings."""
        return self._scale

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden]."""
        if self._group.size == 1:
            x = F.embedding(token_ids, self.weight).to(self._dtype)
        else:
            local = token_ids - self._range.start
            mine = (local >= 0) & (local < self.weight.shape[0])
            x = F.embedding(local.where(mine, 0), self.weight).to(self._dtype) * mine[:, None]
            x = self._group.all_reduce(x)
        return x if self._scale == 1.0 else x * self._scale


class VocabularyHead:
    """Logits over the vocabulary, split among ranks by token id and gathered on the first."""

    def __init__(self, context: BuildContext, module: str, tied_to: VocabularyEmbedding | None) -> None:
        config = context.config
        self._group = context.group
        self._vocab_size = config.vocab_size
        self._share = -(-config.vocab_size // context.group.size)
        self._softcap = config.logit_softcap
        self._prepare = context.prepare
        self._tied = tied_to
        self._linear: Linear | products.Product | None = None
        if tied_to is None:
            part = Rows(module, config.vocab_size, context.group.share(config.vocab_size))
            self._linear = Linear(context, [part], config.hidden_size)
        else:
            context.plan.ignore(f"{module}.weight")

    def finish(self) -> None:
        """Prepare a tied head, once the embedding is loaded."""
        if self._tied is not None:
            self._linear = self._prepare(self._tied.weight, None)

    @property
    def product(self) -> products.Product | None:
        """This rank's part of the product."""
        return self._linear.product if isinstance(self._linear, Linear) else self._linear

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> float32 [R, vocab] on the first rank, on the others the columns that are theirs."""
        assert self._linear is not None
        logits = self._linear(hidden)
        if self._group.size > 1:
            logits = F.pad(logits, (0, self._share - logits.shape[-1]))
            logits = self._group.gather(logits)[:, : self._vocab_size]
        logits = logits.float()
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


class MLP:
    """The gated feed-forward block. [T, hidden] -> [T, hidden]."""

    def __init__(self, context: BuildContext, module: str) -> None:
        config = context.config
        size = config.intermediate_size
        mine = context.group.share(size)
        if context.plan.has(f"{module}.gate_up_proj.weight"):  # stored merged (Phi-3)
            fused = f"{module}.gate_up_proj"
            parts = [Rows(fused, 2 * size, mine), Rows(fused, 2 * size, slice(size + mine.start, size + mine.stop))]
        else:
            parts = [Rows(f"{module}.gate_proj", size, mine), Rows(f"{module}.up_proj", size, mine)]
        self._gate_up = Linear(context, parts, config.hidden_size, bias=config.mlp_bias)
        self._down = RowParallelLinear(context, f"{module}.down_proj", config.hidden_size, size, bias=config.mlp_bias)
        self._activation: Activation = config.activation

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self._down(rows.gated_activation(self._gate_up(x), self._activation))

    @property
    def products(self) -> tuple[products.Product, products.Product]:
        """Gate and up, and down."""
        return self._gate_up.product, self._down.product


class MixtureOfExperts:
    """A router and many small MLPs, of which each token uses a few; experts are split among ranks."""

    def __init__(self, context: BuildContext, module: str, experts: ExpertsConfig) -> None:
        config = context.config
        self._top_k = experts.experts_per_token
        self._renormalize = experts.renormalize
        self._activation: Activation = config.activation
        self._group = context.group
        self._mine = context.group.experts(experts.num_experts)
        # Never in 8 bits: a changed choice of experts is no rounding error.
        self._prepare_router = replace(context, quantization=None).prepare
        self._router: products.Product
        router = context.weight((experts.num_experts, config.hidden_size), self._set_router, context.dtype)
        block = "block_sparse_moe" if context.plan.has(f"{module}.block_sparse_moe.gate.weight") else "mlp"
        context.plan.expect(
            f"{module}.{block}.gate.weight",
            (experts.num_experts, config.hidden_size),
            Piece((WHOLE, WHOLE), router, (WHOLE,)),
        )
        self._experts = [
            self._expert(context, f"{module}.{block}.experts", experts, index) for index in range(experts.num_experts)
        ]

    def _expert(
        self, context: BuildContext, module: str, experts: ExpertsConfig, index: int
    ) -> tuple[Linear, Linear] | None:
        """One expert's gate-and-up and down products; None where another rank holds it."""
        hidden, size = context.config.hidden_size, experts.intermediate_size
        whole, all_rows = slice(0, size), slice(0, hidden)
        if context.plan.has(f"{module}.gate_up_proj"):  # all experts stacked in one tensor
            fused = (f"{module}.gate_up_proj", 2 * size)
            gate_up = [
                Rows(*fused, whole, index, experts.num_experts),
                Rows(*fused, slice(size, 2 * size), index, experts.num_experts),
            ]
            down = [Rows(f"{module}.down_proj", hidden, all_rows, index, experts.num_experts)]
        else:
            named = context.plan.has(f"{module}.{index}.gate_proj.weight")
            gate, up, out = ("gate_proj", "up_proj", "down_proj") if named else ("w1", "w3", "w2")
            gate_up = [Rows(f"{module}.{index}.{gate}", size, whole), Rows(f"{module}.{index}.{up}", size, whole)]
            down = [Rows(f"{module}.{index}.{out}", hidden, all_rows)]
        if not self._mine.start <= index < self._mine.stop:
            for part, columns in [*((part, hidden) for part in gate_up), *((part, size) for part in down)]:
                if part.expert is None:
                    context.plan.expect(f"{part.module}.weight", (part.stored, columns))
            return None
        return Linear(context, gate_up, hidden), Linear(context, down, size)

    def _set_router(self, router: Tensor) -> None:
        self._router = self._prepare_router(router, None)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        probabilities = self._router(x).float().softmax(-1)
        weights, chosen = probabilities.topk(self._top_k, dim=-1)
        if self._renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for index in sorted(set(chosen.flatten().tolist())):
            expert = self._experts[index]
            if expert is not None:
                gate_up, down = expert
                token, slot = (chosen == index).nonzero(as_tuple=True)
                part = down(rows.gated_activation(gate_up(x[token]), self._activation))
                out.index_add_(0, token, part * weights[token, slot, None])
        return self._group.all_reduce(out)


__all__ = [
    "MLP",
    "BuildContext",
    "Index",
    "Linear",
    "MixtureOfExperts",
    "RMSNorm",
    "RowParallelLinear",
    "Rows",
    "SplitRMSNorm",
    "VocabularyEmbedding",
    "VocabularyHead",
]
