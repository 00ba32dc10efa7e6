"""What stored precision costs in accuracy: logit error, greedy agreement and perplexity of one model, several ways.

The reference is the same checkpoint computed in float32 by plain PyTorch. Texts are held-out documents of the corpus
the bundled model was trained on; every position is judged with the true text before it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import bundled_model, random_checkpoint
from benchmarks.report import table

LONGEST = 256


def stored_precision(*, quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """By model and way of storing weights: the errors against float32."""
    documents = 8 if quick else 64
    figures: dict[str, dict[str, dict[str, float]]] = {}
    texts = _held_out(documents)
    with tempfile.TemporaryDirectory() as scratch:
        halved = _half(random_checkpoint("small"), Path(scratch))
        for name, ways in {
            "bundled": {"int8": (bundled_model(), "int8"), "fp16 (as stored)": (bundled_model(), None)},
            "small": {"int8": (random_checkpoint("small"), "int8"), "fp16": (halved, None)},
        }.items():
            part = texts if name == "bundled" else texts[: max(4, documents // 8)]
            folder = bundled_model() if name == "bundled" else random_checkpoint("small")
            expected = _reference(folder, part)
            figures[name] = {way: _compare(_logits(*how, part), expected, part) for way, how in ways.items()}
    table(
        "accuracy of stored weights against float32 by plain PyTorch (small: random weights, no perplexity)",
        ["", "largest logit error, of the largest logit", "greedy agreement", "perplexity", "float32's"],
        [
            [
                f"{name}, {way}",
                f"{of['logit_error']:.1e}",
                f"{of['greedy_agreement']:.2%}",
                *((f"{of[key]:.4f}" if name == "bundled" else "-") for key in ("perplexity", "float32_perplexity")),
            ]
            for name, ways in figures.items()
            for way, of in ways.items()
        ],
    )
    return figures


def _held_out(count: int) -> list[list[int]]:
    """Token ids of held-out documents, cut to a bearable length."""
    from tokenizers import Tokenizer

    from training import corpus

    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    texts = (corpus.document(7, index, corpus.HELD_OUT).text for index in range(count))
    return [tokenizer.encode(text, add_special_tokens=False).ids[:LONGEST] for text in texts]


def _half(source: Path, target: Path) -> Path:
    """The checkpoint with its weights in fp16."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = {name: weight.half() for name, weight in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _logits(folder: Path, quantization: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits at every position. Each float32 [length, vocab]."""
    from penstock_core.attention import AttentionBatch, LayerPages
    from penstock_core.models import load_model

    model, page = load_model(folder, quantization=quantization), 16
    shape = -(-LONGEST // page), page, model.num_local_kv_heads, model.config.head_dim
    pages = [LayerPages(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.config.num_layers)]
    out = []
    for text in texts:
        batch = AttentionBatch.build([text], [0], [range(-(-len(text) // page))], page)
        out.append(model.logits(model.forward(batch, pages)))
    return out


def _reference(folder: Path, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(text)])).logits[0] for text in texts]


def _compare(ours: list[Tensor], expected: list[Tensor], texts: Sequence[Sequence[int]]) -> dict[str, float]:
    largest = max(float(logits.abs().max()) for logits in expected)
    positions = sum(len(text) for text in texts)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(ours, expected, strict=True))
    return {
        "logit_error": max(float((a - b).abs().max()) for a, b in zip(ours, expected, strict=True)) / largest,
        "greedy_agreement": same / positions,
        "perplexity": _perplexity(ours, texts),
        "float32_perplexity": _perplexity(expected, texts),
    }


def _perplexity(logits: list[Tensor], texts: Sequence[Sequence[int]]) -> float:
    surprise = [
        -torch.log_softmax(of[:-1].double(), -1).gather(-1, torch.tensor(text[1:])[:, None])
        for of, text in zip(logits, texts, strict=True)
    ]
    return math.exp(float(torch.cat(surprise).mean()))
