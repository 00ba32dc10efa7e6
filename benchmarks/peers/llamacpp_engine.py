"""llama.cpp through its C API: continuous batching by hand, and a prompt beginning that a call's prompts share is
computed once and kept for the next call."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from serve import Generate, serve

CONTEXT_TOKENS = 32_768
MOST_SEQUENCES = 33  # 32, and one that holds the shared beginning
BATCH_TOKENS = 2048
LEAST_SHARED = 64  # shorter common beginnings are not worth a sequence of their own


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Drop what it logs: pages of it for every graph."""


def load(checkpoint: str, converted: str, threads: int, precision: str) -> tuple[Generate, dict[str, object]]:
    """Write a GGUF file once, then load it. `precision`: float32, or int8 for q8_0; the KV cache is fp16."""
    path = Path(converted) / f"llamacpp-{Path(checkpoint).name}-{precision}.gguf"
    if not path.exists():
        export(Path(checkpoint), path, int8=precision == "int8")
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_load_model_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT_TOKENS, BATCH_TOKENS, 512
    settings.n_seq_max, settings.n_threads, settings.n_threads_batch = MOST_SEQUENCES, threads, threads
    settings.kv_unified = True
    context = llama_cpp.llama_new_context_with_model(model, settings)
    engine = Engine(context, llama_cpp.llama_n_vocab(llama_cpp.llama_model_get_vocab(model)))
    return engine.generate, {"version": llama_cpp.__version__}


class Engine:
    """Greedy decoding of many sequences in one context."""

    def __init__(self, context: ctypes.c_void_p, vocabulary: int) -> None:
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)
        self._vocabulary = vocabulary
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, MOST_SEQUENCES)
        self._kept: list[int] = []

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Continue each prompt by exactly `new_tokens` tokens."""
        shared = self._share(prompts)
        for sequence in range(1, len(prompts) + 1):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            if shared:
                llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, 0, shared)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts, 1)
            for position, token in enumerate(prompt[shared:], shared)
        ]
        outputs = [[token] for token in self._run(rows)]
        for step in range(new_tokens - 1):
            rows = [
                (output[-1], len(prompt) + step, sequence, True)
                for sequence, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1)
            ]
            for output, token in zip(outputs, self._run(rows), strict=True):
                output.append(token)
        return outputs

    def _share(self, prompts: list[list[int]]) -> int:
        """Tokens of the common beginning of all prompts, computed in sequence 0 unless it is there already."""
        first, last = min(prompts), max(prompts)
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        if len(prompts) == 1 or same < LEAST_SHARED:
            return 0
        beginning = prompts[0][:same]
        if beginning != self._kept:
            llama_cpp.llama_memory_seq_rm(self._memory, 0, -1, -1)
            self._run([(token, position, 0, False) for position, token in enumerate(beginning)])
            self._kept = beginning
        return same

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token, position, sequence, wanted); the most likely next token of each wanted row."""
        chosen = []
        for first in range(0, len(rows), BATCH_TOKENS):
            part = rows[first : first + BATCH_TOKENS]
            batch = self._batch
            batch.n_tokens = len(part)
            for at, (token, position, sequence, wanted) in enumerate(part):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, wanted
            if llama_cpp.llama_decode(self._context, batch):
                raise SystemExit("llama_decode failed")
            for at, row in enumerate(part):
                if row[3]:
                    logits = llama_cpp.llama_get_logits_ith(self._context, at)
                    chosen.append(int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax()))
        return chosen


def export(checkpoint: Path, path: Path, *, int8: bool) -> None:
    """Write a Qwen3 checkpoint as GGUF, without a vocabulary: prompts are token ids."""
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(unfinished), "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            target = names.get_name(name, try_suffixes=(".weight",))
            data = tensor.astype(np.float32)
            if int8 and data.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
            else:
                writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


if __name__ == "__main__":
    serve(load)
