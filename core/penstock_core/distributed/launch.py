"""What is checked before ranks start, and what they must agree on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from penstock_core import __version__
from penstock_core.distributed.config import DistributedConfig
from penstock_core.distributed.inputs import choose_device
from penstock_core.distributed.rendezvous import Place
from penstock_core.models import ModelConfig, Stage, TensorParallelGroup, find_checkpoint
from penstock_core.protocol.errors import InvalidConfiguration

if TYPE_CHECKING:
    from penstock_core.distributed.engine import EngineConfig

_RANKS_PER_CORE = 4  # more only take turns


def check_ranks(config: EngineConfig) -> None:
    """Refuse, before anything starts, a model that cannot be cut as asked.

    Raises:
        UnsupportedModel: the sizes do not divide the model. BrokenCheckpoint: there is none.
        InvalidConfiguration: this process is a rank of something already.
    """
    if dist.is_initialized():
        raise InvalidConfiguration(
            "distributed", "this process is in a process group already; close that engine first, or use another process"
        )
    distributed = config.distributed
    model = ModelConfig.from_checkpoint(find_checkpoint(config.model))
    TensorParallelGroup(0, distributed.tensor_parallel).check(model)
    Stage(0, distributed.pipeline_parallel).check(model)


def check_place(place: Place, distributed: DistributedConfig) -> None:
    """Refuse a number of processes that is not the number of ranks."""
    if place.size != distributed.num_ranks:
        raise InvalidConfiguration(
            "WORLD_SIZE",
            f"is {place.size}, and tensor_parallel {distributed.tensor_parallel} times pipeline_parallel "
            f"{distributed.pipeline_parallel} makes {distributed.num_ranks} ranks; start that many, or change these",
        )


def device_of(name: str, place: Place) -> torch.device:
    """The device of one rank: on CUDA one each, by its number among the ranks of its host.

    Raises:
        InvalidConfiguration: there are more ranks than devices, or far more than cores.
    """
    device = choose_device(name)
    if device.type == "cpu":
        cores = os.cpu_count() or 1
        if place.local_size > _RANKS_PER_CORE * cores:
            raise InvalidConfiguration(
                "distributed",
                f"{place.local_size} ranks on a machine of {cores} cores would only take turns; "
                f"use at most {_RANKS_PER_CORE * cores}, or more machines",
            )
        return device
    if ":" in name:
        raise InvalidConfiguration(
            "device", f"{name!r} is one device for {place.size} ranks; use cuda, and choose with CUDA_VISIBLE_DEVICES"
        )
    found = torch.cuda.device_count()
    if place.local_size > found:
        raise InvalidConfiguration(
            "distributed",
            f"{place.local_size} ranks need a CUDA device each, and {found} are there; use at most {found} ranks on "
            "this host, or set device to cpu",
        )
    return torch.device("cuda", place.local_rank)


def claims(config: EngineConfig) -> dict[str, str]:
    """What all ranks must say alike, by the name of the setting; the folder's place may differ between hosts."""
    settings = dataclasses.asdict(config)
    for own in ("model", "threads"):
        del settings[own]
    page = settings.pop("page")
    distributed = settings.pop("distributed")
    return {
        "penstock version": __version__,
        "torch version": torch.__version__,
        "model": fingerprint(find_checkpoint(config.model)),
        **{name: json.dumps(value) for name, value in settings.items()},
        **{f"page.{name}": json.dumps(value) for name, value in page.items()},
        **{f"distributed.{name}": json.dumps(value) for name, value in distributed.items()},
    }


def fingerprint(folder: Path) -> str:
    """Digest of a checkpoint's configuration and of its tensors' names, shapes and places; not of their values."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            digest.update(stream.read(length))
    return digest.hexdigest()[:16]
