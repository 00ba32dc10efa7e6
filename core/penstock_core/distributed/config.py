"""DistributedConfig: over how many processes a model is cut, and how."""

from __future__ import annotations

from dataclasses import dataclass

from penstock_core.models import Stage
from penstock_core.protocol.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class DistributedConfig:
    """Settings of the process group. Ranks are numbered stage by stage: those of one stage hold slices of its layers.

    Attributes:
        tensor_parallel: ranks that each hold a slice of every layer of their stage.
        pipeline_parallel: stages that the layers are cut into, one after the other.
        timeout_s: a rank that waits this long for another in the middle of a step gives up, and the group with it.
        micro_batch_tokens: with several stages, a step is cut into pieces of at least this many tokens, so that stages
            work on different pieces at once; smaller pieces would read the weights more often than they save waiting.
        shared_memory: let ranks of one host share memory where they can; else they use sockets.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    timeout_s: float = 120.0
    micro_batch_tokens: int = 64
    shared_memory: bool = True

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel"):
            if not 1 <= getattr(self, name) <= 64:
                raise InvalidConfiguration(f"distributed.{name}", f"{getattr(self, name)} is outside 1 to 64")
        if self.timeout_s <= 0.0:
            raise InvalidConfiguration("distributed.timeout_s", f"{self.timeout_s} is not above 0 seconds")
        if self.micro_batch_tokens < 1:
            raise InvalidConfiguration("distributed.micro_batch_tokens", f"{self.micro_batch_tokens} is below 1")

    @property
    def num_ranks(self) -> int:
        """Processes in all."""
        return self.tensor_parallel * self.pipeline_parallel

    def stage_of(self, rank: int) -> Stage:
        """The stage that a rank belongs to."""
        return Stage(rank // self.tensor_parallel, self.pipeline_parallel)

    def ranks_of(self, stage: Stage) -> list[int]:
        """All ranks of a stage."""
        first = stage.index * self.tensor_parallel
        return list(range(first, first + self.tensor_parallel))
