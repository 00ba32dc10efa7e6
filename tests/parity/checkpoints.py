"""Small random checkpoints of every family, written by transformers, and greedy decoding over our paged forward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from penstock_core.attention import AttentionBatch, LayerPages
from penstock_core.models import DecoderModel

VOCABULARY = 211
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def write_checkpoint(folder: Path, config: Any, **save: Any) -> Any:
    """A random model of this config, saved to the folder; weights are large enough that its greedy text varies."""
    torch.manual_seed(1234)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.normal_(0.0 if "gemma" in config.model_type else 1.0, 0.2)
            elif "bias" in name:
                parameter.normal_(0.0, 0.3)
            elif "embed" in name:
                parameter.normal_(0.0, 0.05 if "gemma" in config.model_type else 1.0)  # else it echoes its input
            else:
                parameter.normal_(0.0, 1.6 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder, **save)
    return model


def pages_for(model: DecoderModel, count: int, page_size: int, dtype: torch.dtype = torch.float32) -> list[LayerPages]:
    """Zeroed pages for every layer."""
    shape = (count, page_size, model.num_local_kv_heads, model.config.head_dim)
    return [
        LayerPages(*(torch.zeros(shape, dtype=dtype, device=model.device) for _ in "kv"))
        for _ in range(model.config.num_layers)
    ]


def logits_of(
    model: DecoderModel, prompts: Sequence[Sequence[int]], chunk: int = 10_000, page_size: int = 4
) -> list[Tensor]:
    """Logits at every position of every prompt, computed together in chunks. Each float32 [length, vocab]."""
    pages, tables = _scattered(model, [len(prompt) for prompt in prompts], page_size)
    out: list[list[Tensor]] = [[] for _ in prompts]
    for start in itertools.count(0, chunk):
        active = [n for n, prompt in enumerate(prompts) if start < len(prompt)]
        if not active:
            return [torch.cat(parts) for parts in out]
        news = [prompts[n][start : start + chunk] for n in active]
        batch = AttentionBatch.build(news, [start] * len(active), [tables[n] for n in active], page_size, model.device)
        logits = model.logits(model.forward(batch, pages))
        for n, part in zip(active, logits.split([len(new) for new in news]), strict=True):
            out[n].append(part)
    raise AssertionError("unreachable")


def greedy(
    model: DecoderModel, prompts: Sequence[Sequence[int]], new_tokens: int, chunk: int = 10_000, page_size: int = 4
) -> list[list[int]]:
    """Greedy continuations of prompts of different lengths, decoded together; prompts enter in chunks."""
    pages, tables = _scattered(model, [len(prompt) + new_tokens for prompt in prompts], page_size)
    tokens = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    while any(len(text) < len(prompt) + new_tokens for text, prompt in zip(tokens, prompts, strict=True)):
        active = [n for n, prompt in enumerate(prompts) if len(tokens[n]) < len(prompt) + new_tokens]
        news = [tokens[n][computed[n] : computed[n] + chunk] for n in active]
        batch = AttentionBatch.build(
            news, [computed[n] for n in active], [tables[n] for n in active], page_size, model.device
        )
        hidden = model.forward(batch, pages)
        chosen = model.logits(hidden[batch.query_start[1:].long() - 1]).argmax(-1).tolist()
        for n, new, token in zip(active, news, chosen, strict=True):
            computed[n] += len(new)
            if computed[n] == len(tokens[n]):
                tokens[n].append(token)
    return [text[len(prompt) :] for text, prompt in zip(tokens, prompts, strict=True)]


def _scattered(model: DecoderModel, lengths: list[int], page_size: int) -> tuple[list[LayerPages], list[list[int]]]:
    """Pages, and one table per sequence whose pages lie in no particular order."""
    needed = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(7)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    return pages_for(model, sum(needed), page_size, model.dtype), tables


def reference_logits(model: Any, prompt: Sequence[int]) -> Tensor:
    """transformers' logits at every position. float32 [length, vocab]."""
    with torch.no_grad():
        return model(torch.tensor([list(prompt)])).logits[0].float()


def reference_greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """transformers' greedy continuation."""
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=new_tokens)
    return out[0, len(prompt) :].tolist()
