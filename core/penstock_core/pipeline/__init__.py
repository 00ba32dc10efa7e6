"""The pipeline that joins batcher, engine and sampler, and the executor that drives it."""

from penstock_core.pipeline.config import PipelineConfig
from penstock_core.pipeline.executor import InferencePipelineExecutor
from penstock_core.pipeline.pipeline import UnifiedInferencePipeline
from penstock_core.pipeline.requests import (
    Capacity,
    ChoiceChunk,
    EngineDescription,
    EngineRequest,
    FinishedRequest,
    RequestOutput,
    ResumedChoice,
)
from penstock_core.pipeline.statistics import PipelineStatistics

__all__ = [
    "Capacity",
    "ChoiceChunk",
    "EngineDescription",
    "EngineRequest",
    "FinishedRequest",
    "InferencePipelineExecutor",
    "PipelineConfig",
    "PipelineStatistics",
    "RequestOutput",
    "ResumedChoice",
    "UnifiedInferencePipeline",
]
