"""A whole decoder in one call of the C kernels, for models whose every part they know.

Same parts, same order of sums, same bits as layer by layer; what goes away is the time between the parts, which for a
small model is most of a step. `WholeDecoder` holds a table of addresses and whatever they point to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import byref, pointer
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, LayerPages
from penstock_core.kernels import memory, native
from penstock_core.kernels.linear import FloatProduct, Int8Product

PARALLEL_WORK = 5_000_000
"""Multiplications of a step from which a second thread saves more than ten barriers a layer cost."""

_KEPT_SCRATCH = 32 << 20  # floats that stay allocated between steps; fresh ones fault page by page

CProduct = FloatProduct | Int8Product


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer.

    Attributes:
        norms: before attention, after it, before the MLP, after it; None for none.
        head_norms: of queries and keys, each head alone or, with `norm_projections`, all heads together.
        rope: gives the rotary table for positions below its argument; None for a layer without rotation.
    """

    qkv: CProduct
    output: CProduct
    gate_up: CProduct
    down: CProduct
    norms: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    head_norms: tuple[Tensor, Tensor] | None
    norm_projections: bool
    window: int | None
    rope: Callable[[int], Tensor] | None


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What all layers share; see `ModelConfig`."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    intermediate: int
    gelu: bool
    embed_scale: float
    eps: float
    attention_scale: float
    softcap: float


class WholeDecoder:
    """Runs all layers of a float32 model on the CPU.

    Args:
        kernels: of an instruction set that has matrix products.
        shape: sizes.
        layers: the parts of each.
        embedding: [vocab, hidden], as stored.
        norm: float32 [hidden], the last norm.
        head: the product that gives logits.

    Attributes:
        parts, head: as given. table: the kernels' own description of the model. draft: the kernel that guesses.
    """

    def __init__(
        self,
        kernels: native.Kernels,
        shape: DecoderShape,
        layers: Sequence[LayerParts],
        embedding: Tensor,
        norm: Tensor,
        head: CProduct,
    ) -> None:
        self.shape = shape
        self.draft = kernels.draft
        self._kernels = kernels
        self.parts = list(layers)
        self.head = head
        self._kept = embedding, norm  # their addresses are in use
        self._layers = (native.Layer * len(layers))(*map(_row, layers))
        self.table = native.Decoder(
            layers=self._layers,
            head=head.matrix,
            embedding=embedding.data_ptr(),
            norm=norm.data_ptr(),
            vocab=shape.vocab,
            num_layers=len(layers),
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dim=shape.dim,
            intermediate=shape.intermediate,
            gelu=shape.gelu,
            embedding_type=native.stored_type(embedding.dtype),
            embed_scale=shape.embed_scale,
            eps=shape.eps,
            scale=shape.attention_scale,
            softcap=shape.softcap,
        )
        self._width: int = kernels.decoder_scratch(byref(self.table))
        self._weights = sum(
            part.out_features * part.in_features
            for layer in layers
            for part in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        self._pages: Sequence[LayerPages] | None = None
        self._ropes: list[Tensor | None] = [None] * len(layers)
        self._reach = 0  # positions that all rotary tables have
        self._scratch = torch.empty(0)
        self._call = native.DecodeCall(decoder=pointer(self.table))

    def bind(self, pages: Sequence[LayerPages], max_seq_len: int) -> bool:
        """Point the table at these pages, and at rotary tables for `max_seq_len` positions; whether the kernels can."""
        if pages is not self._pages:
            if not all(_readable(layer) for layer in pages):
                return False
            for row, layer in zip(self._layers, pages, strict=True):
                row.k, row.v = layer.k.data_ptr(), layer.v.data_ptr()
                row.k_scale, row.v_scale = native.pointer(layer.k_scale), native.pointer(layer.v_scale)
                row.kv_type = native.stored_type(layer.k.dtype)
            self.table.page_size = pages[0].k.shape[1]
            self._pages = pages
        if max_seq_len > self._reach:
            self._ropes = [None if part.rope is None else part.rope(max_seq_len) for part in self.parts]
            for row, rope in zip(self._layers, self._ropes, strict=True):
                if rope is not None:
                    row.rope, row.rotary_dim = rope.data_ptr(), rope.shape[1]
            self._reach = min((rope.shape[0] for rope in self._ropes if rope is not None), default=1 << 62)
        return True

    def forward(self, batch: AttentionBatch) -> Tensor:
        """Hidden states [T, hidden] of a step, after `bind`.

        Raises:
            IndexError: a token is outside the vocabulary.
        """
        out = torch.empty(batch.num_tokens, self.shape.hidden)
        scratch = self.scratch(batch.num_tokens)  # the call holds only its address
        if not self._kernels.decode(byref(self.call(batch, out, scratch))):
            raise self.unknown_token()
        return out

    def call(self, batch: AttentionBatch, out: Tensor, scratch: Tensor) -> native.DecodeCall:
        """The kernel's arguments for a step; good until the next."""
        call = self._call
        call.token_ids, call.positions = batch.token_ids.data_ptr(), batch.positions.data_ptr()
        call.slots, call.block_table = batch.slot_mapping.data_ptr(), batch.block_table.data_ptr()
        call.query_start, call.seq_lens = batch.query_start.data_ptr(), batch.seq_lens.data_ptr()
        call.out, call.scratch = out.data_ptr(), scratch.data_ptr()
        call.tokens, call.sequences = batch.num_tokens, batch.num_sequences
        call.table_stride = batch.block_table.stride(0)
        call.threads = self.threads(batch.num_tokens)
        return call

    def unknown_token(self) -> IndexError:
        """What is wrong where the kernels did nothing."""
        return IndexError(f"a token id is outside the vocabulary of {self.shape.vocab}")

    def threads(self, tokens: int) -> int:
        """How many threads a step of this many tokens is worth."""
        return torch.get_num_threads() if tokens * self._weights >= PARALLEL_WORK else 1

    def scratch(self, tokens: int, extra: int = 0) -> Tensor:
        """Working memory of a step, with `extra` floats more per token; a small one's stays."""
        wanted = tokens * (self._width + extra)
        if wanted > _KEPT_SCRATCH:
            return torch.empty(wanted)
        if len(self._scratch) < wanted:
            self._scratch = memory.empty([wanted], torch.float32, lasting=False)
        return self._scratch


def _row(parts: LayerParts) -> native.Layer:
    norms = [native.pointer(norm) for norm in parts.norms]
    return native.Layer(
        parts.qkv.matrix,
        parts.output.matrix,
        parts.gate_up.matrix,
        parts.down.matrix,
        *norms,
        *(native.pointer(norm) for norm in parts.head_norms or (None, None)),
        window=parts.window or 0,
        norm_projections=parts.norm_projections,
    )


def _readable(pages: LayerPages) -> bool:
    """Whether the kernels know pages of this kind."""
    return (
        native.stored_type(pages.k.dtype) is not None
        and pages.k.shape[3] <= native.MAX_HEAD_DIM
        and pages.k.is_contiguous()
    )
