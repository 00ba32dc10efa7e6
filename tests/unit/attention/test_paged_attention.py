"""Paged attention equals plain attention over each sequence alone, whatever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from penstock_core.attention import AttentionBatch, AttentionSpec, LayerPages, PagedAttention, attention_for
from penstock_core.attention.pages import store
from penstock_core.kernels import build, native

PAGE = 4


def reference(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of the last rows of one sequence in float64. q: [Lq, H, D]; k, v: [L, Hkv, D]."""
    q, k, v = q.double(), k.double(), v.double()
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    query = torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
    key = torch.arange(k.shape[0])
    seen = key <= query
    if spec.window is not None:
        seen &= key > query - spec.window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def ways() -> list[native.Kernels | None]:
    """The kernels of every instruction set this machine has, and none."""
    path = build.find_library() if native.kernels() is not None else None
    return [None] if path is None else [None, *native.available(str(path))]


@pytest.fixture(autouse=True, params=ways(), ids=lambda way: "torch alone" if way is None else way.instruction_set)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with native.using(request.param):
        yield
    torch.set_num_threads(threads)


class Scene:
    """Sequences with (context before, new tokens), scattered over shuffled pages.

    They begin with the same `shared` tokens (whole pages of them), as far as their context goes.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        shared: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(len(shapes) + heads)
        lengths = [before + new for before, new in shapes]
        self.k = [torch.randn(length, kv_heads, dim, generator=generator) for length in lengths]
        self.v = [torch.randn(length, kv_heads, dim, generator=generator) for length in lengths]
        self.q = [torch.randn(new, heads, dim, generator=generator) for _, new in shapes]
        needed = [-(-length // PAGE) for length in lengths]
        order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        longest = max(range(len(shapes)), key=lambda n: shapes[n][0])
        for n, (before, _) in enumerate(shapes):
            common = min(shared, before) // PAGE
            self.tables[n][:common] = self.tables[longest][:common]
            self.k[n][: common * PAGE] = self.k[longest][: common * PAGE]
            self.v[n][: common * PAGE] = self.v[longest][: common * PAGE]
        shape = (sum(needed) + 3, PAGE, kv_heads, dim)
        quantized = dtype is torch.int8
        self.pages = LayerPages(
            torch.zeros(shape, dtype=dtype),
            torch.zeros(shape, dtype=dtype),
            torch.zeros(shape[:3]) if quantized else None,
            torch.zeros(shape[:3]) if quantized else None,
        )
        self.shapes = shapes

    def batch(self, sequences: list[int], begin: str) -> AttentionBatch:
        """The new tokens of some sequences ("new"), or everything before them ("before")."""
        spans = [(0, self.shapes[n][0]) if begin == "before" else self.shapes[n] for n in sequences]
        return AttentionBatch.build(
            [[0] * new for _, new in spans], [before for before, _ in spans], [self.tables[n] for n in sequences], PAGE
        )

    def run(self, attention: PagedAttention, spec: AttentionSpec, sequences: list[int]) -> list[Tensor]:
        """Outputs of the new tokens of some sequences, computed in one batch."""
        history = [n for n in sequences if self.shapes[n][0]]
        for begin, members in (("before", history), ("new", sequences)):
            if not members:
                continue
            plan_batch = self.batch(members, begin)
            plan = attention.plan(plan_batch)
            spans = [
                slice(0, self.shapes[n][0]) if begin == "before" else slice(self.shapes[n][0], None) for n in members
            ]
            k = torch.cat([self.k[n][span] for n, span in zip(members, spans, strict=True)])
            v = torch.cat([self.v[n][span] for n, span in zip(members, spans, strict=True)])
            store(k, self.pages.k, self.pages.k_scale, plan_batch.slot_mapping)
            store(v, self.pages.v, self.pages.v_scale, plan_batch.slot_mapping)
        out = attention.attend(torch.cat([self.q[n] for n in sequences]), self.pages, plan, spec)
        return list(out.split([self.shapes[n][1] for n in sequences]))


MIXES = {
    "one decode": [(9, 1)],
    "decodes of many lengths": [(0, 1), (1, 1), (3, 1), (4, 1), (7, 1), (30, 1), (61, 1)],
    "whole prompts": [(0, 5), (0, 40), (0, 4)],
    "chunks, drafts and decodes": [(8, 40), (13, 4), (2, 4), (20, 1), (0, 1), (21, 33), (3, 70)],
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(
    "spec",
    [AttentionSpec(0.3), AttentionSpec(0.3, window=5), AttentionSpec(0.3, softcap=2.0), AttentionSpec(0.3, 17, 5.0)],
    ids=["plain", "window", "softcap", "window and softcap"],
)
def test_equals_plain_attention_of_each_sequence(
    mix: list[tuple[int, int]], heads: int, kv_heads: int, spec: AttentionSpec
) -> None:
    scene = Scene(mix, heads, kv_heads, 16)
    for n, out in enumerate(scene.run(attention_for("cpu"), spec, list(range(len(mix))))):
        expected = reference(scene.q[n], scene.k[n], scene.v[n], spec)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_result_does_not_depend_on_the_rest_of_the_batch() -> None:
    mix = MIXES["chunks, drafts and decodes"]
    together = Scene(mix, 6, 2, 16).run(attention_for("cpu"), AttentionSpec(0.25), list(range(len(mix))))
    for n in range(len(mix)):
        alone = Scene(mix, 6, 2, 16).run(attention_for("cpu"), AttentionSpec(0.25), [n])[0]
        torch.testing.assert_close(alone, together[n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", [AttentionSpec(0.25), AttentionSpec(0.25, window=9, softcap=3.0)])
def test_deterministic_bits_depend_on_neither_batch_nor_chunking(spec: AttentionSpec) -> None:
    attention = attention_for("cpu", deterministic=True)
    mix = MIXES["chunks, drafts and decodes"]
    together = Scene(mix, 6, 2, 16).run(attention, spec, list(range(len(mix))))
    for n, (before, new) in enumerate(mix):
        alone = Scene(mix, 6, 2, 16)
        assert torch.equal(alone.run(attention, spec, [n])[0], together[n])
        for token in range(new):  # the same keys are already in the pages; one query at a time
            batch = AttentionBatch.build([[0]], [before + token], [alone.tables[n]], PAGE)
            out = attention.attend(alone.q[n][token : token + 1], alone.pages, attention.plan(batch), spec)
            assert torch.equal(out[0], together[n][token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("threads", [1, 2])
def test_sequences_that_begin_with_the_same_pages_get_the_bits_of_each_by_itself(
    dtype: torch.dtype, window: int | None, threads: int
) -> None:
    """Read once for several of them, the pages give what they give to one."""
    torch.set_num_threads(threads)
    shapes = [
        (190, 1),
        (161, 5),
        (144, 1),
        (150, 1),
        (10, 1),
        (128, 1),
        (127, 2),
        (189, 24),
        (0, 7),
        (200, 1),
        (140, 1),
    ]
    shapes += [(130 + 7 * n % 60, 1 + n % 3) for n in range(12)]
    spec = AttentionSpec(0.25, window)
    attention = attention_for("cpu", deterministic=True)
    scene = Scene(shapes, 6, 2, 16, dtype, shared=140)
    together = scene.run(attention, spec, list(range(len(shapes))))
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2}.get(dtype, 5e-2)
    for n, out in enumerate(together):
        expected = reference(scene.q[n], scene.k[n], scene.v[n], spec)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(
            attention.attend(scene.q[n], scene.pages, attention.plan(scene.batch([n], "new")), spec), out
        )


def test_a_long_prompt_has_the_bits_of_its_tokens_alone_by_the_kernel_only() -> None:
    """What the setting is for where there is no kernel: a long chunk is one large product, in another order."""
    spec = AttentionSpec(0.25)
    long = Scene([(0, 1100)], 6, 2, 16)
    whole = long.run(attention_for("cpu"), spec, [0])[0]
    batch = AttentionBatch.build([[0]], [1099], [long.tables[0]], PAGE)
    plan = attention_for("cpu").plan(batch)
    last = attention_for("cpu").attend(long.q[0][-1:], long.pages, plan, spec)[0]
    torch.testing.assert_close(last, whole[-1])
    assert torch.equal(last, whole[-1]) == (native.kernels() is not None)


def test_stale_numbers_in_unused_slots_change_nothing() -> None:
    mix = [(5, 1), (0, 3)]
    clean = Scene(mix, 4, 2, 8)
    dirty = Scene(mix, 4, 2, 8)
    dirty.pages.k.fill_(1e4)
    dirty.pages.v.fill_(-1e4)
    for a, b in zip(
        clean.run(attention_for("cpu"), AttentionSpec(0.3), [0, 1]),
        dirty.run(attention_for("cpu"), AttentionSpec(0.3), [0, 1]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_int8_pages_stay_within_the_quantisation_error() -> None:
    mix = MIXES["chunks, drafts and decodes"]
    scene = Scene(mix, 6, 2, 32, torch.int8)
    spec = AttentionSpec(32**-0.5)
    for n, out in enumerate(scene.run(attention_for("cpu"), spec, list(range(len(mix))))):
        expected = reference(scene.q[n], scene.k[n], scene.v[n], spec)
        assert (out.double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_half_precision_pages_serve_float32_queries() -> None:
    scene = Scene([(9, 1), (0, 6)], 4, 2, 16, torch.float16)
    for n, out in enumerate(scene.run(attention_for("cpu"), AttentionSpec(0.25), [0, 1])):
        expected = reference(scene.q[n], scene.k[n], scene.v[n], AttentionSpec(0.25))
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
