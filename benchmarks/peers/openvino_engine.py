"""OpenVINO GenAI: its continuous batching pipeline with prefix caching, on a model exported by optimum-intel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from serve import Generate, serve


def load(checkpoint: str, converted: str, threads: int, precision: str) -> tuple[Generate, dict[str, object]]:
    """Export once, then load. `precision`: float32 of weights, keys and values; int8: 8 bits of each."""
    folder = Path(converted) / f"openvino-{Path(checkpoint).name}-{precision}"
    if not (folder / "openvino_detokenizer.xml").exists():
        export(checkpoint, folder, int8=precision == "int8")
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.cache_size = 4  # GiB
    scheduler.max_num_batched_tokens = 2048
    properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    # Of itself it would keep 16 bits with float32 weights, and 8 with 8-bit ones.
    properties["KV_CACHE_PRECISION"] = {"float32": "f32", "int8": "u8"}[precision]
    pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.max_new_tokens = config.min_new_tokens = new_tokens
        inputs = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results: list[Any] = pipeline.generate(inputs, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate, {"version": ov.__version__}


def export(checkpoint: str, folder: Path, *, int8: bool) -> None:
    """Write the model, its tokenizer and its detokenizer in OpenVINO's format."""
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, load_in_8bit=int8, compile=False)
    model.save_pretrained(folder)
    tokenizer, detokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint), with_detokenizer=True)
    ov.save_model(tokenizer, folder / "openvino_tokenizer.xml")
    ov.save_model(detokenizer, folder / "openvino_detokenizer.xml")


if __name__ == "__main__":
    serve(load)
