"""Serving on a GPU, for `python -m benchmarks.engine --device cuda`: 256 requests at once, ours beside a peer.

Random weights of Qwen3-0.6B's shape in bfloat16; prompts and outputs of 100 to 1024 tokens, lengths drawn once; greedy,
end of sequence ignored. The peer is `transformers`' continuous batching, where it is installed and works. Beside the
rate stands what memory bandwidth allows: every step reads the weights once, and every token its context's keys and
values. With `--ablate`, ours also runs without graphs and without overlap. Ends with status 3 where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import random_checkpoint
from benchmarks.report import alternate, chart, console, publish, table

NO_DEVICE = 3
"""Exit status where there is no GPU to measure."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that come at once: prompts and the number of tokens to continue each by."""

    prompts: list[list[int]]
    outputs: list[int]

    @property
    def output_tokens(self) -> int:
        """Tokens to be produced."""
        return sum(self.outputs)

    @classmethod
    def drawn(cls, count: int, shortest: int, longest: int, vocabulary: int) -> Workload:
        """Lengths from `shortest` to `longest` tokens."""
        shape = random.Random(0)
        prompts = [
            [shape.randrange(2, vocabulary) for _ in range(shape.randint(shortest, longest))] for _ in range(count)
        ]
        return cls(prompts, [shape.randint(shortest, longest) for _ in range(count)])


def measure(arguments: argparse.Namespace) -> None:
    """Run the comparison and print it."""
    if not torch.cuda.is_available():
        console.print("no CUDA device: nothing can be measured here")
        sys.exit(NO_DEVICE)
    quick = arguments.quick
    dtype = "bfloat16" if arguments.dtype == "float32" else arguments.dtype  # float32 is the CPU's default
    folder = random_checkpoint("tiny" if quick else "qwen3-0.6b", dtype)
    work = Workload.drawn(16 if quick else 256, 10 if quick else 100, 64 if quick else 1024, 2000)
    variants: dict[str, dict[str, Any]] = {"penstock": {}}
    if arguments.ablate:
        variants |= {
            "penstock without graphs": {"graphs": False},
            "penstock without overlap": {"overlap": False},
            "penstock without both": {"graphs": False, "overlap": False},
        }
    figures: dict[str, dict[str, float]] = {}
    about: dict[str, Any] = {}
    refusals: dict[str, str] = {}
    for name, options in variants.items():
        figures[name], about[name] = _ours(folder, dtype, work, arguments, options)
        gc.collect()  # its pages are the next one's
        torch.cuda.empty_cache()
    try:
        figures["transformers"] = _alone("transformers", _transformers(folder, dtype, work), arguments.runs)
    except Exception as error:  # whatever a peer does, ours is reported
        refusals["transformers"] = f"{type(error).__name__}: {error}"
        console.print(f"transformers' continuous batching does not work here and is left out: {error}")
    bandwidth = copied_bytes_per_s(quick=quick)
    bound = _bound(folder, work, bandwidth, about["penstock"])
    columns = ["output_tok_s", "seconds"]
    ratio = {
        name: figures["penstock"]["output_tok_s"] / of["output_tok_s"]
        for name, of in figures.items()
        if name != "penstock"
    }
    table(
        f"{len(work.prompts)} requests, {work.output_tokens} output tokens, {dtype}, {torch.cuda.get_device_name()}",
        ["", *columns, "ours is"],
        [[name, *(of[column] for column in columns), ratio.get(name, 1.0)] for name, of in figures.items()],
    )
    chart("output tokens per second", {name: of["output_tok_s"] for name, of in figures.items()})
    reached = figures["penstock"]["output_tok_s"]
    console.print(
        f"memory moves {bandwidth / 1e9:,.0f} GB/s: at most {bound:,.0f} output tokens/s; reached {reached / bound:.0%}"
    )
    publish(
        "engine-cuda",
        {
            "gpu": device_report(),
            "dtype": dtype,
            "kv_dtype": arguments.kv_dtype,
            "requests": len(work.prompts),
            "output_tokens": work.output_tokens,
            "figures": figures,
            "ratios": ratio,
            "engine": about,
            "left_out": refusals,
            "bandwidth_gb_s": bandwidth / 1e9,
            "bound_output_tok_s": bound,
        },
        as_json=arguments.json,
    )


def device_report() -> dict[str, Any]:
    """The GPUs, the driver's and the libraries' versions, and what attention is there."""
    from penstock_core.attention import varlen

    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "name": torch.cuda.get_device_name(),
        "count": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability()),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "varlen_attn": varlen.kernel() is not None,
    }
    device = torch.device("cuda", torch.cuda.current_device())
    heads = varlen.HeadShape(torch.bfloat16, device, 16, 128)
    for page_size in (varlen.SMALL_PAGE, varlen.LARGE_PAGE):
        for decoding in (False, True):
            found = varlen.convention_for(heads, page_size, 8, False, decoding, False)
            report[f"{'decode' if decoding else 'prefill'}, pages of {page_size}"] = str(found)
    return report


def copied_bytes_per_s(*, quick: bool) -> float:
    """Bytes read and written per second by a large copy within the device: the best of several."""
    source = torch.empty((2**24 if quick else 2**31), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def _bound(folder: Path, work: Workload, bandwidth: float, about: Mapping[str, Any]) -> float:
    """Output tokens per second if nothing but weights and contexts had to be read, at this bandwidth."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    contexts = sum(
        sum(range(len(prompt), len(prompt) + new)) for prompt, new in zip(work.prompts, work.outputs, strict=True)
    )
    steps = max(work.outputs)
    return work.output_tokens / ((steps * weights + contexts * float(about["kv_bytes_per_token"])) / bandwidth)


def _ours(
    folder: Path, dtype: str, work: Workload, arguments: argparse.Namespace, options: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of our engine with some options, and what it was."""
    from penstock_core.cache import PageConfig
    from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
    from penstock_core.sampling import SamplingParams

    began = time.perf_counter()
    executor = InferencePipelineExecutor(
        PipelineConfig(
            model=folder,
            device=arguments.device,
            dtype=dtype,
            max_num_sequences=len(work.prompts),
            max_batch_tokens=8192,
            max_model_len=2048,
            prefix_cache=False,
            page=PageConfig(kv_dtype=arguments.kv_dtype),
            **options,
        )
    )
    engine = executor.pipeline.engine
    about = {
        "ready_s": time.perf_counter() - began,
        "page_size": engine.page_size,
        "num_pages": engine.num_pages,
        "kv_bytes_per_token": engine.page_bytes / engine.page_size,
        "graphs": engine._graphs is not None,
        "overlap": executor.pipeline._returns is not None,
    }
    params = [SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True) for new in work.outputs]

    def run() -> Mapping[str, float]:
        started = time.perf_counter()
        results = executor.generate(work.prompts, params)
        seconds = time.perf_counter() - started
        assert [len(result.token_ids) for result in results] == work.outputs
        return {"output_tok_s": work.output_tokens / seconds, "seconds": seconds}

    figures = _alone("penstock", run, arguments.runs)
    statistics = executor.pipeline.statistics()
    about |= {"steps": statistics.steps, "mean_step_ms": statistics.mean_step_ms, "preemptions": statistics.preemptions}
    executor.pipeline.close()
    return figures, about


def _transformers(folder: Path, dtype: str, work: Workload) -> Callable[[], Mapping[str, float]]:
    """The peer, loaded: its manager schedules requests of their own lengths."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model = model.to("cuda").eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=max(work.outputs), do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def run() -> Mapping[str, float]:
        manager = model.init_continuous_batching(generation_config=settings)
        manager.start()
        try:
            manager.add_request(work.prompts[0], max_new_tokens=2)
            while not _finished(manager):  # its cache is there, and its thread runs
                pass
            started = time.perf_counter()
            for prompt, new in zip(work.prompts, work.outputs, strict=True):
                manager.add_request(prompt, max_new_tokens=new)
            produced = ended = 0
            while ended < len(work.prompts):
                tokens = _finished(manager)
                ended += tokens > 0
                produced += tokens
            seconds = time.perf_counter() - started
        finally:
            manager.stop(block=True)
        if produced != work.output_tokens:
            raise RuntimeError(f"{produced} tokens came instead of {work.output_tokens}")
        return {"output_tok_s": produced / seconds, "seconds": seconds}

    return run


def _finished(manager: Any) -> int:
    """Tokens of the next request that ends, 0 for news of one that goes on; raises if nothing comes."""
    result = manager.get_result(timeout=120)
    if result is None or result.error:
        raise RuntimeError(result.error if result is not None else "no result for 120 s")
    return len(result.generated_tokens) if result.is_finished() else 0


def _alone(name: str, run: Callable[[], Mapping[str, float]], runs: int) -> dict[str, float]:
    """Medians of one contestant: each has the whole device's memory, so they cannot take turns."""
    return alternate({name: run}, runs, name)[name]
