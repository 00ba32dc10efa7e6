"""`load_model`: from a folder or a hub id to a model ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch

from penstock_core.attention import attention_for
from penstock_core.models import hub
from penstock_core.models.config import ModelConfig
from penstock_core.models.decoder import DecoderModel
from penstock_core.models.errors import BrokenCheckpoint, UnsupportedModel
from penstock_core.models.layers import BuildContext
from penstock_core.models.parallel import WHOLE_MODEL, Stage, TensorParallelGroup
from penstock_core.models.products import Quantization
from penstock_core.models.weights import Progress, WeightPlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_checkpoint(model: str | Path) -> Path:
    """The folder of a checkpoint: a local one as it is, a hub id (`owner/name`) downloaded to the hub's own cache.

    Raises:
        BrokenCheckpoint: neither exists, or the download failed.
        UnsupportedModel: the hub's model is not one that runs here.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise BrokenCheckpoint(f"{path}: not a folder; give the folder that holds config.json")
    name = str(model)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BrokenCheckpoint(f"{path}: no such folder; give a checkpoint folder or a hub id such as owner/name")
    return hub.download(name)


def choose_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in: by name, or for `auto` float32 on CPU and the checkpoint's own elsewhere.

    Raises:
        UnsupportedModel: no such dtype.
    """
    if name == "auto":
        name = "float32" if device.type == "cpu" else config.dtype
    if name not in DTYPES:
        raise UnsupportedModel(f"dtype {name!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    model: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    quantization: Quantization | None = None,
    group: TensorParallelGroup | None = None,
    stage: Stage = WHOLE_MODEL,
    deterministic: bool = False,
    progress: Progress | None = None,
) -> DecoderModel:
    """Load a checkpoint's weights, tensor by tensor, into the decoder its config.json describes.

    Args:
        model: checkpoint folder, or hub id.
        device: where to put it.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        quantization: `int8` for 8-bit weights and activations (x86 CPU only).
        group: this rank of a tensor-parallel group; its slices alone are read.
        stage: the part of the layers that is wanted; no others are read.
        deterministic: fix the order of sums whatever else is in the batch.
        progress: called with (bytes loaded, bytes in all) as the files stream by.

    Raises:
        BrokenCheckpoint: files are missing, damaged, or do not fit config.json.
        UnsupportedModel: the architecture, an option of it, the dtype or the quantization is not supported.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        raise UnsupportedModel(f"quantization {quantization!r} is not supported; supported: int8")
    folder = find_checkpoint(model)
    config = ModelConfig.from_checkpoint(folder)
    device = torch.device(device)
    group = group or TensorParallelGroup()
    group.check(config)
    stage.check(config)
    plan = WeightPlan(folder)
    dtype = choose_dtype(dtype, config, device) if isinstance(dtype, str) else dtype
    context = BuildContext(plan, config, group, device, dtype, quantization, deterministic, stage)
    decoder = DecoderModel(context, attention_for(device, deterministic=deterministic))
    plan.load(progress)
    decoder.finish_loading()
    return decoder
