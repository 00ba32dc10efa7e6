"""Where a step's time goes: `python -m benchmarks.step [--json] [--quick]`.

The bundled model and the `small` size, decoding greedily at batch 1, 8 and 32. Scheduling, sampling and delivery
(detokenising, stop strings, chunks) are timed in the running pipeline. What happens inside the forward pass, one call
of the C kernels, is timed by calling its matrix products and its attention alone with the same sizes; the rest of the
model is what remains (norms, rotary embedding, activation, page writes, and preparing the call). Medians over steps.
Also: what storing weights in 8 and 16 bits costs in accuracy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from ctypes import byref
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import stored_precision
from benchmarks.checkpoints import bundled_model, random_checkpoint
from benchmarks.report import parser, publish, table

BATCHES = (1, 8, 32)
CONTEXT = 128
PARTS = ("scheduling", "linears", "attention", "rest of the model", "sampling", "delivery", "other")


def main() -> None:
    """Take the step apart for every model and batch."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=200, help="decode steps per batch")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.steps = 30
    torch.set_num_threads(arguments.threads)
    models = {"bundled": bundled_model()} | ({} if arguments.quick else {"small": random_checkpoint("small")})
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, folder in models.items():
        figures[name] = {str(batch): take_apart(folder, batch, arguments) for batch in BATCHES}
        table(
            f"a decode step of the {name} model, microseconds (share), {arguments.threads} threads, context {CONTEXT}",
            ["batch", *PARTS, "step"],
            [
                [batch, *(f"{of[part]:,.0f} ({of[part] / of['step']:.0%})" for part in PARTS), f"{of['step']:,.0f}"]
                for batch, of in figures[name].items()
            ],
        )
    accuracy = stored_precision(quick=arguments.quick)
    publish("step", {"microseconds": figures, "accuracy": accuracy}, as_json=arguments.json)


def take_apart(folder: Path, batch: int, arguments: Any) -> dict[str, float]:
    """Microseconds of each part of a decode step, and of the whole."""
    from penstock_core.cache import PageConfig
    from penstock_core.pipeline import EngineRequest, PipelineConfig, UnifiedInferencePipeline
    from penstock_core.sampling import SamplingParams

    pipeline = UnifiedInferencePipeline(
        PipelineConfig(folder, threads=arguments.threads, page=PageConfig(num_pages=1024), max_num_sequences=batch)
    )
    for number in range(batch):
        prompt = [(7 * number + 13 * place) % 500 + 20 for place in range(CONTEXT - arguments.steps // 2)]
        sampling = SamplingParams(temperature=0.0, max_tokens=arguments.steps, ignore_eos=True)
        pipeline.add_request(EngineRequest(f"r{number}", prompt or [20], sampling))
    timers = {
        "scheduling": Timer(pipeline.batcher, "schedule", "update"),
        "model": Timer(pipeline.engine, "forward"),
        "sampling": Timer(pipeline._sampler, "sample"),
        "delivery": Timer(pipeline, "_advance", "_deliver"),
    }
    steps: dict[str, list[float]] = {part: [] for part in (*timers, "step")}
    while pipeline.has_work:
        full = len(pipeline.batcher.running) == batch
        for timer in timers.values():
            timer.seconds = 0.0
        began = time.perf_counter()
        pipeline.step()
        elapsed = time.perf_counter() - began
        if full:  # no prompt in it
            steps["step"].append(elapsed)
            for part, timer in timers.items():
                steps[part].append(timer.seconds)
    medians = {part: statistics.median(values) * 1e6 for part, values in steps.items()}
    update_us = medians["delivery"] and statistics.median(timers["scheduling"].of["update"]) * 1e6
    medians["delivery"] -= update_us  # it is called from there, and counts as scheduling
    linears, attention = inside_the_model(pipeline.engine, batch)
    model = medians.pop("model")
    accounted = sum(medians[part] for part in ("scheduling", "sampling", "delivery")) + model
    return medians | {
        "linears": linears,
        "attention": attention,
        "rest of the model": max(0.0, model - linears - attention),
        "other": max(0.0, medians["step"] - accounted),
    }


class Timer:
    """Counts the seconds spent in some methods of an object."""

    def __init__(self, owner: Any, *names: str) -> None:
        self.seconds = 0.0
        self.of: dict[str, list[float]] = {}
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name), self.of.setdefault(name, [])))

    def _timed(self, method: Callable[..., Any], taken: list[float]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                taken.append(time.perf_counter() - began)
                self.seconds += taken[-1]

        return timed


def inside_the_model(engine: Any, batch: int) -> tuple[float, float]:
    """Microseconds of all matrix products, the head's included, and of all attention, of a decode step."""
    from penstock_core.attention import AttentionBatch, AttentionSpec
    from penstock_core.attention.cpu import CPUPagedAttention

    model, config, size = engine.model, engine.config, engine.page_size
    whole = model.whole
    if whole is None:
        raise SystemExit("this needs the C kernels with AVX2 or AVX-512")
    calls = [
        call
        for layer in whole.parts
        for product in (layer.qkv, layer.output, layer.gate_up, layer.down)
        for call in (prepared(product, batch, whole.threads(batch)),)
    ]
    calls.append(prepared(whole.head, batch, torch.get_num_threads()))
    per_sequence = -(-(CONTEXT + 1) // size)
    tables = [range(n * per_sequence, (n + 1) * per_sequence) for n in range(batch)]
    step = AttentionBatch.build([[20]] * batch, [CONTEXT] * batch, tables, size)
    attention = CPUPagedAttention()
    plan = attention.plan(step)
    plan.call.threads = whole.threads(batch)
    q = torch.randn(batch, config.num_heads, config.head_dim)
    spec = AttentionSpec(config.attention_scale)

    def attend() -> None:
        for pages in engine.layers:
            attention.attend(q, pages, plan, spec)

    def multiply() -> None:
        for call in calls:
            call()

    return usual_us(multiply), usual_us(attend)


def prepared(product: Any, rows: int, threads: int) -> Callable[[], None]:
    """A call of the product's kernel on random rows, with nothing left to prepare."""
    from penstock_core.kernels import native

    x, out = torch.randn(rows, product.in_features), torch.empty(rows, product.out_features)
    scratch = torch.empty(rows * product.in_features)
    matrix, kernel = product.matrix, product.kernel
    call = native.LinearCall(
        matrix.w,
        matrix.bias,
        x.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
        rows,
        product.out_features,
        product.in_features,
        product.in_features,
        matrix.type,
        threads,
    )
    kept = x, out, scratch, product
    return lambda: kernel(byref(call)) if kept else None


def usual_us(work: Callable[[], None]) -> float:
    """Median microseconds."""
    taken = []
    for _ in range(50):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


if __name__ == "__main__":
    main()
