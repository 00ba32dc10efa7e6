"""Checkpoints: config mapping, decoder layers, weight loading, tokenizer and chat template."""

from __future__ import annotations

from penstock_core.models.config import ModelConfig
from penstock_core.models.decoder import DecoderModel
from penstock_core.models.errors import BrokenCheckpoint, UnsupportedModel
from penstock_core.models.loading import find_checkpoint, load_model
from penstock_core.models.parallel import TensorParallelGroup

__all__ = [
    "BrokenCheckpoint",
    "DecoderModel",
    "ModelConfig",
    "TensorParallelGroup",
    "UnsupportedModel",
    "find_checkpoint",
    "load_model",
]
