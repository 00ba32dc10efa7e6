"""DistributedConfig: over how many processes a model is cut, and how they find one another."""

from __future__ import annotations

from dataclasses import dataclass

from penstock_core.protocol.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class DistributedConfig:
    """Settings of the process group.

    Attributes:
        tensor_parallel: ranks that each hold a slice of every layer. Only 1 is supported so far.
    """

    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise InvalidConfiguration("distributed.tensor_parallel", f"{self.tensor_parallel} is below 1")
        if self.tensor_parallel > 1:
            raise InvalidConfiguration(
                "distributed.tensor_parallel",
                f"{self.tensor_parallel} ranks are not supported yet; use 1, and more worker processes for throughput",
            )
