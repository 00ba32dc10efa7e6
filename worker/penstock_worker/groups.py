"""Which groups of ranks a supervisor runs, and what each gets: its GPUs, and CPU threads for each of its ranks.

A group is one worker: rank 0 pulls jobs, the others follow it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock_core.protocol.errors import InvalidConfiguration
from penstock_worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Group:
    """One worker with its ranks.

    Attributes:
        device: what its ranks are told.
        visible: CUDA_VISIBLE_DEVICES of its processes; None leaves the supervisor's.
        threads: CPU threads of each rank.
    """

    slot: int
    device: str
    visible: str | None
    threads: int


def deal(settings: WorkerSettings, gpus: Sequence[str], cores: int) -> list[Group]:
    """Deal ranks, GPUs and cores out to groups.

    Args:
        settings: `gpus`, `ranks`, `processes` and the sizes of a group.
        gpus: the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.
        cores: CPU cores that all ranks share.

    Raises:
        InvalidConfiguration: ranks do not divide into groups, GPUs are missing or named twice, or flags contradict.
    """
    size = settings.group_size
    chosen = _chosen_gpus(settings, gpus)
    ranks = _count_ranks(settings, chosen)
    if ranks % size:
        field = "--ranks" if settings.ranks is not None else "--gpus"
        raise InvalidConfiguration(
            field,
            f"{ranks} ranks do not divide into groups of {size}; give a multiple of {size}, or set --tensor-parallel "
            f"(times --pipeline-parallel) to a divisor of {ranks}",
        )
    groups = ranks // size
    if settings.processes not in (1, groups):
        raise InvalidConfiguration(
            "--processes", f"is {settings.processes}, but {ranks} ranks make {groups} groups of {size}; leave one out"
        )
    threads = settings.threads or max(1, cores // ranks)
    return [Group(slot, *_place(settings, chosen, slot, size), threads) for slot in range(groups)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, without loading a CUDA library."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


def physical_device(device: str, ranks: int, gpus: Sequence[str]) -> str:
    """The machine's own name for what a worker calls `cuda:<n>` among the GPUs it sees: `cuda:2,3` for two ranks."""
    kind, _, number = device.partition(":")
    names = gpus[int(number or 0) :][:ranks]
    return f"cuda:{','.join(names)}" if kind == "cuda" and names else device


def _chosen_gpus(settings: WorkerSettings, gpus: Sequence[str]) -> list[str]:
    """The GPUs to use; none where the ranks run on the CPU or a single device was named."""
    if settings.gpus is None:
        return list(gpus) if settings.device in ("auto", "cuda") else []
    if settings.device not in ("auto", "cuda"):
        raise InvalidConfiguration("--gpus", f"names GPUs, and --device is {settings.device}; give one of the two")
    numbers = [int(number) for number in settings.gpus.split(",")]
    for place, number in enumerate(numbers):
        if number in numbers[:place]:
            raise InvalidConfiguration("--gpus", f"names GPU {number} twice; name each once")
        if number >= len(gpus):
            there = f"0 to {len(gpus) - 1} are" if len(gpus) > 1 else "0 is" if gpus else "none is"
            raise InvalidConfiguration(
                "--gpus", f"GPU {number} is not there ({there}); name others, or run on the CPU with --ranks"
            )
    return [gpus[number] for number in numbers]


def _count_ranks(settings: WorkerSettings, chosen: Sequence[str]) -> int:
    named = settings.gpus is not None
    if settings.ranks is None:
        ranks = len(chosen) if named else settings.processes * settings.group_size
    else:
        ranks = settings.ranks
    if not chosen or (ranks <= len(chosen) and not named) or ranks == len(chosen):
        return ranks
    if named:
        raise InvalidConfiguration(
            "--ranks", f"is {ranks}, and --gpus names {len(chosen)}: each rank takes one; leave --ranks out"
        )
    if settings.ranks is None and settings.group_size == 1:
        return ranks  # --processes alone: several workers may share a GPU
    field = "--ranks" if settings.ranks is not None else "--processes"
    raise InvalidConfiguration(
        field,
        f"{ranks} ranks need a GPU each, and {len(chosen)} {'are' if len(chosen) > 1 else 'is'} there; "
        "start fewer, or set --device cpu",
    )


def _place(settings: WorkerSettings, chosen: Sequence[str], slot: int, size: int) -> tuple[str, str | None]:
    """Device and CUDA_VISIBLE_DEVICES of a group; GPUs are dealt out in turn."""
    if not chosen:
        return settings.device, None
    return "cuda", ",".join(chosen[(slot * size + rank) % len(chosen)] for rank in range(size))
