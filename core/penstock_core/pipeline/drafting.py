"""The draft model beside the main one: where it is, and how its engine differs from the main model's."""

from __future__ import annotations

from dataclasses import replace

from penstock_core.distributed import DistributedConfig, DistributedInferenceEngine
from penstock_core.models import find_checkpoint
from penstock_core.pipeline.config import PipelineConfig
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.speculative import SpeculationConfig, beside


def load_draft_engine(config: PipelineConfig, speculation: SpeculationConfig) -> DistributedInferenceEngine | None:
    """The engine of the draft model, if one is wanted and there is one.

    Raises:
        InvalidConfiguration: the `draft` proposer was asked for, and there is no draft model.
    """
    if not speculation.may_use_draft_model:
        return None
    folder = speculation.draft_model or beside(find_checkpoint(config.model))
    if folder is not None:
        engine = replace(
            config.engine(),
            model=folder,
            page=speculation.draft_pages,
            quantization=None,
            graphs=False,
            distributed=DistributedConfig(),
        )
        return DistributedInferenceEngine.load(replace(engine, max_model_len=None))
    if speculation.proposer == "draft":
        raise InvalidConfiguration(
            "speculation.draft_model",
            "is not set, and no folder beside the model's is named like it with -draft added; set it, or choose the "
            "ngram, suffix or auto proposer",
        )
    return None
