"""Every kernel, in every instruction set this machine has, against float64; and its bits against the batch."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock_core.attention import LayerPages
from penstock_core.kernels import build, linear, native, rows

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C compiler here")


def instruction_sets() -> list[native.Kernels]:
    path = build.find_library()
    return [] if path is None else native.available(str(path))


@pytest.fixture(params=instruction_sets(), ids=lambda kernels: kernels.instruction_set)
def kernels(request: pytest.FixtureRequest) -> Iterator[native.Kernels]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with native.using(request.param):
        yield request.param
    torch.set_num_threads(threads)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


SHAPES = [(1, 32, 32), (3, 33, 7), (12, 200, 65), (13, 64, 31), (40, 257, 130), (200, 48, 96)]  # rows, in, out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_float_products(
    kernels: native.Kernels, random: torch.Generator, shape: tuple[int, int, int], stored: torch.dtype
) -> None:
    rows_, inner, outer = shape
    weight = torch.randn(outer, inner, generator=random).to(stored)
    bias, x = torch.randn(outer, generator=random), torch.randn(rows_, inner, generator=random)
    if kernels.instruction_set == "portable":
        assert linear.float_product(weight, bias) is None
        return
    product = linear.float_product(weight, bias)
    assert product is not None
    out = product(x)
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T + bias.double(), rtol=2e-6, atol=2e-5)
    for r in range(rows_):
        assert torch.equal(product(x[r : r + 1])[0], out[r]), "a row's bits depend on its batch"


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_products_are_exact_sums(
    kernels: native.Kernels, random: torch.Generator, shape: tuple[int, int, int]
) -> None:
    rows_, inner, outer = shape
    weight, x = torch.randn(outer, inner, generator=random), torch.randn(rows_, inner, generator=random)
    x[0] *= 100  # an outlier must not cost the other rows
    product = linear.int8_product(weight, None)
    if kernels.linear_int8 is None:
        assert product is None
        return
    assert product is not None
    w_scale, x_scale = weight.abs().amax(1) / 127, x.abs().amax(1) / 127
    whole = (x / x_scale[:, None]).round().long() @ (weight / w_scale[:, None]).round().long().T
    expected = whole.double() * x_scale.double()[:, None] * w_scale.double()
    out = product(x)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for r in range(rows_):
        assert torch.equal(product(x[r : r + 1])[0], out[r])
    assert (out.double() - x.double() @ weight.double().T).norm(dim=1).div(expected.norm(dim=1)).max() < 0.05


def test_an_all_zero_row_gives_zeros(kernels: native.Kernels) -> None:
    for product in (linear.int8_product(torch.ones(5, 9), None), linear.float_product(torch.ones(5, 9), None)):
        if product is not None:
            assert torch.equal(product(torch.zeros(2, 9)), torch.zeros(2, 5))


@pytest.mark.parametrize("shape", [(1, 16), (5, 192), (3, 37), (300, 100)])
def test_norms(kernels: native.Kernels, random: torch.Generator, shape: tuple[int, int]) -> None:
    x, delta = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    weight = torch.randn(shape[1], generator=random)
    total = x.double() + delta.double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    residual = x.clone()
    torch.testing.assert_close(
        rows.add_rms_norm(residual, delta, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(residual, x + delta)
    torch.testing.assert_close(rows.rms_norm(residual, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (3, 65), (200, 96)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activations(
    kernels: native.Kernels, random: torch.Generator, shape: tuple[int, int], activation: str
) -> None:
    x = torch.randn(shape[0], 2 * shape[1], generator=random) * 6
    x[0, :4] = torch.tensor([200.0, -200.0, 0.0, -88.0])
    gate, up = x.double().chunk(2, -1)
    if activation == "silu":
        expected = gate * torch.sigmoid(gate) * up
    else:
        expected = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    out = rows.gated_activation(x, activation)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dim", [8, 64, 80])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [0.0, 0.5, 1.0])
def test_rotation_and_storing_equal_the_plain_version(
    kernels: native.Kernels, random: torch.Generator, stored: torch.dtype, dim: int, normed: bool, rotated: float
) -> None:
    tokens, shape = 9, rows.HeadShape(4, 2, dim)
    qkv = torch.randn(tokens, 8 * dim, generator=random)
    rotary_dim = int(dim * rotated)
    angles = torch.rand(50, rotary_dim // 2, generator=random) * 6
    table = torch.cat([angles.cos(), angles.sin()], -1)
    positions = torch.randint(50, (tokens,), generator=random)
    slots = torch.randperm(12, generator=random)[:tokens]
    norms = (torch.rand(dim, generator=random), torch.rand(dim, generator=random)) if normed else None

    def run(chosen: native.Kernels | None) -> tuple[Tensor, LayerPages]:
        scales = [torch.zeros(3, 4, 2) if stored == torch.int8 else None for _ in "kv"]
        pages = LayerPages(*(torch.zeros(3, 4, 2, dim, dtype=stored) for _ in "kv"), *scales)
        rotation = rows.Rotation(table, positions) if rotary_dim else None
        with native.using(chosen):
            q = rows.rotate_and_store(qkv.clone(), shape, rotation, pages, slots, norms, 1e-6)
        return q, pages

    (ours, pages), (plain, expected) = run(kernels), run(None)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for a, b in ((pages.k, expected.k), (pages.v, expected.v)):
        if stored == torch.int8:
            assert (a.int() - b.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-2 if stored != torch.float32 else 1e-5, atol=1e-5)


def test_half_precision_stores_round_as_torch_does(kernels: native.Kernels) -> None:
    specials = [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 1e9, -1e9, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5, 1e-40, math.inf]
    values = torch.cat([torch.tensor(specials), torch.randn(498, generator=torch.Generator().manual_seed(0)) * 1e-4])
    for dtype in (torch.float16, torch.bfloat16):
        pages = LayerPages(torch.zeros(1, 1, 1, 512, dtype=dtype), torch.zeros(1, 1, 1, 512, dtype=dtype))
        qkv = values.repeat(3)[None].clone()
        rows.rotate_and_store(qkv, rows.HeadShape(1, 1, 512), None, pages, torch.zeros(1, dtype=torch.long))
        assert torch.equal(pages.v.flatten(), values.to(dtype))


def test_without_a_compiler_all_goes_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "find_library", lambda: None)
    native._load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert native.kernels() is None
    assert "no C compiler" in caplog.text
    native._load.cache_clear()


def test_a_compiler_that_refuses_says_why(tmp_path: Path) -> None:
    with pytest.raises(build.BuildFailed, match=r"unrecogni|unknown"):
        build.build(tmp_path, ("--no-such-flag",))


def test_structures_are_as_large_as_in_c() -> None:
    """9 pointers, 2 int64, 8 int32, 2 floats; and so on: a field added on one side only would shift the rest."""
    assert ctypes.sizeof(native.AttentionCall) == 9 * 8 + 2 * 8 + 10 * 4
    assert ctypes.sizeof(native.RotateCall) == 10 * 8 + 8 + 7 * 4 + 4
    assert ctypes.sizeof(native.LinearCall) == 5 * 8 + 4 * 8 + 2 * 4
    assert ctypes.sizeof(native.Int8LinearCall) == 8 * 8 + 4 * 8 + 8
