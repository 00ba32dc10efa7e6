"""A worker whose engine breaks on demand: `python -m tests.integration.worker.breaking_worker <worker flags>`.

A prompt that begins with `STEP` breaks the steps it is part of (as running out of memory does); one that begins with
`THREAD` ends the engine's thread (as a bug in the loop does).
"""

from __future__ import annotations

import os
import sys

from penstock_core.batching import TokenBatch
from penstock_core.distributed import StepOutput
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig, UnifiedInferencePipeline
from penstock_worker import flags, structured_log
from penstock_worker.app import run
from penstock_worker.engine import Engine

STEP = (7, 7, 7)
THREAD = (9, 9, 9)


class BrokenThread(BaseException):
    """Nothing catches it on its way out of the thread."""


def load(config: PipelineConfig) -> Engine:
    pipeline = UnifiedInferencePipeline(config)
    whole = pipeline.engine.forward

    def forward(batch: TokenBatch) -> StepOutput:
        for sequence in batch.sequences:
            if tuple(sequence.prompt_ids[:3]) == STEP:
                raise RuntimeError("out of memory, as the test wants it")
            if tuple(sequence.prompt_ids[:3]) == THREAD:
                raise BrokenThread("the loop has a bug, as the test wants it")
        return whole(batch)

    pipeline.engine.forward = forward  # type: ignore[method-assign]
    return InferencePipelineExecutor(pipeline)


if __name__ == "__main__":
    settings = flags.parse(sys.argv[1:], os.environ)
    structured_log.configure("info", "json", settings.worker_id or "")
    sys.exit(run(settings, load))
