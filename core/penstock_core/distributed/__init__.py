"""The engine that computes steps: model, pages and process group."""

from penstock_core.distributed.config import DistributedConfig
from penstock_core.distributed.engine import DistributedInferenceEngine, EngineConfig, StepOutput
from penstock_core.distributed.followers import follow_from_environment
from penstock_core.distributed.memory import MemoryReport

__all__ = [
    "DistributedConfig",
    "DistributedInferenceEngine",
    "EngineConfig",
    "MemoryReport",
    "StepOutput",
    "follow_from_environment",
]
