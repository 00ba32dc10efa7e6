"""Drafting several tokens a step without ever changing the output."""

from penstock_core.speculative.config import SpeculationConfig, beside
from penstock_core.speculative.decoder import SpeculativeDecoder
from penstock_core.speculative.draft_model import DraftModelProposer
from penstock_core.speculative.statistics import SpeculationStatistics

__all__ = ["DraftModelProposer", "SpeculationConfig", "SpeculationStatistics", "SpeculativeDecoder", "beside"]
