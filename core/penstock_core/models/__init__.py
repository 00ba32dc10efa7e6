"""Checkpoints: config mapping, decoder layers, weight loading, tokenizer and chat template."""

from __future__ import annotations

from penstock_core.models.config import ModelConfig
from penstock_core.models.decoder import DecoderModel
from penstock_core.models.errors import BrokenCheckpoint, UnsupportedModel
from penstock_core.models.loading import find_checkpoint, load_model
from penstock_core.models.parallel import Stage, TensorParallelGroup
from penstock_core.models.tokenizer import Tokenizer

__all__ = [
    "BrokenCheckpoint",
    "DecoderModel",
    "ModelConfig",
    "Stage",
    "TensorParallelGroup",
    "Tokenizer",
    "UnsupportedModel",
    "find_checkpoint",
    "load_model",
]
