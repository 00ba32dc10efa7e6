"""Token batching: which sequences compute which tokens in the next step."""

from penstock_core.batching.arrivals import AdaptiveBatchTimeout
from penstock_core.batching.batcher import TokenBatcher
from penstock_core.batching.budget import BudgetController
from penstock_core.batching.config import BatchingConfig
from penstock_core.batching.sequence import SequenceState
from penstock_core.batching.table import SequenceTable, TokenBatch

__all__ = [
    "AdaptiveBatchTimeout",
    "BatchingConfig",
    "BudgetController",
    "SequenceState",
    "SequenceTable",
    "TokenBatch",
    "TokenBatcher",
]
