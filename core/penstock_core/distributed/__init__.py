"""The engine that computes steps: model, pages and process group."""

from penstock_core.distributed.config import DistributedConfig
from penstock_core.distributed.engine import DistributedInferenceEngine, EngineConfig, StepOutput

__all__ = ["DistributedConfig", "DistributedInferenceEngine", "EngineConfig", "StepOutput"]
