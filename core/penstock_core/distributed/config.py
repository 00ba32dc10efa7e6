"""DistributedConfig: over how many processes a model is cut."""

from __future__ import annotations

from dataclasses import dataclass

from penstock_core.protocol.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class DistributedConfig:
    """Settings of the process group.

    Attributes:
        tensor_parallel: ranks that each hold a slice of every layer; this process is the first and starts the others.
        timeout_s: a rank that waits this long for another gives up, and the group with it.
    """

    tensor_parallel: int = 1
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if not 1 <= self.tensor_parallel <= 64:
            raise InvalidConfiguration(
                "distributed.tensor_parallel", f"{self.tensor_parallel} is outside 1 to 64 ranks"
            )
        if self.timeout_s <= 0.0:
            raise InvalidConfiguration("distributed.timeout_s", f"{self.timeout_s} is not above 0 seconds")
