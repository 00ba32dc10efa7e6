"""Random-weight checkpoints of some sizes, made once in a temporary folder: right for speed, never for quality.

`tiny` has the bundled model's shape, `small` some 30 million parameters, `medium` the shape of Qwen3-0.6B with a
smaller vocabulary, `qwen3-0.6b` with its own. They are written by `transformers`, so that every contestant reads the
same files.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import console

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
             "head_dim": 32, "intermediate_size": 512, "vocab_size": 2048},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
              "head_dim": 64, "intermediate_size": 1408, "vocab_size": 8192},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
               "head_dim": 128, "intermediate_size": 3072, "vocab_size": 32000},
    "qwen3-0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
                   "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936},
}  # fmt: skip
SIZES = tuple(_SHAPES)


def bundled_model() -> Path:
    """Folder of the model that the worker ships."""
    import penstock_worker

    return Path(penstock_worker.__file__).parent / "bundled" / "penstock-story"


def random_checkpoint(size: str, dtype: str = "float32") -> Path:
    """Folder of the checkpoint of this size; made on first use and kept in the temporary folder.

    Its tokenizer is the bundled model's: prompts here are token ids, so it is never asked for text.
    """
    import torch
    import transformers

    folder = Path(tempfile.gettempdir()) / "penstock-benchmarks" / f"{size}-{dtype}"
    if (folder / "config.json").exists():
        return folder
    console.print(f"making the {size} checkpoint in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **_SHAPES[size], max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1
    )
    model = transformers.Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder / name)
    model.save_pretrained(folder)
    return folder
