"""PipelineConfig: every setting of one engine, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from penstock_core.batching import BatchingConfig
from penstock_core.cache import PageConfig
from penstock_core.distributed import DistributedConfig, EngineConfig
from penstock_core.models.products import Quantization
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.speculative import SpeculationConfig


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """Settings of a UnifiedInferencePipeline.

    Attributes:
        model: checkpoint folder, or hub id (`owner/name`).
        served_name: name that requests may ask for; None: the last part of `model`.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`. quantization: None or `int8`.
        max_model_len: longest prompt plus output in tokens; None: what the model and an explicit page pool allow.
        max_num_sequences: sequences that run at once. max_batch_tokens: token budget of a step.
        page: the key/value cache. prefix_cache: reuse computed prefixes between requests.
        speculation: draft tokens and check several in a step; None: decode plainly. Outputs are the same.
        distributed: process group.
        seed: where requests without a seed get theirs from; None: fresh ones in every process.
        overlap: launch each step before the tokens of the one before are read, so that a GPU never waits for the host.
            None: on a GPU, without speculation and on one rank; it does not work with drafts or several ranks.
        graphs: capture decode steps as CUDA graphs; None: wherever that can be.
        deterministic: a row's result does not depend on the rest of the batch, bit for bit, at some cost of speed.
        threads: CPU threads of each rank; None leaves PyTorch's setting alone, or shares the cores among several ranks.
        aging_interval_s, preemption_margin, target_step_ms: see `BatchingConfig`.
        batch_timeout_ms: longest that an idle engine waits for company of a lone request, where recent arrivals suggest
            that it pays; 0: never.
    """

    model: str | Path
    served_name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: Quantization | None = None
    max_model_len: int | None = None
    max_num_sequences: int = 64
    max_batch_tokens: int = 2048
    page: PageConfig = field(default_factory=PageConfig)
    prefix_cache: bool = True
    speculation: SpeculationConfig | None = None
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    seed: int | None = None
    overlap: bool | None = None
    graphs: bool | None = None
    deterministic: bool = False
    threads: int | None = None
    aging_interval_s: float = 60.0
    preemption_margin: float | None = 0.5
    target_step_ms: float | None = None
    batch_timeout_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InvalidConfiguration("threads", f"{self.threads} is below 1")
        if self.batch_timeout_ms < 0.0:
            raise InvalidConfiguration("batch_timeout_ms", f"{self.batch_timeout_ms} is below 0 milliseconds")
        if self.overlap and (self.speculation is not None or self.distributed.num_ranks > 1):
            other = "speculation" if self.speculation is not None else "several ranks"
            raise InvalidConfiguration("overlap", f"does not work with {other}; leave one of them out")
        self.batching(max_model_len=2, num_pages=1)

    def overlaps(self, device_type: str) -> bool:
        """`overlap`, or its default for a kind of device."""
        if self.overlap is not None:
            return self.overlap
        return device_type == "cuda" and self.speculation is None and self.distributed.num_ranks == 1

    @property
    def name(self) -> str:
        """The served name."""
        return self.served_name or Path(self.model).name

    def engine(self) -> EngineConfig:
        """The part that the engine reads."""
        return EngineConfig(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            max_num_sequences=self.max_num_sequences,
            max_batch_tokens=self.max_batch_tokens,
            graphs=self.graphs,
            deterministic=self.deterministic,
            threads=self.threads,
            page=self.page,
            distributed=self.distributed,
        )

    def batching(self, max_model_len: int, num_pages: int) -> BatchingConfig:
        """The part that the batcher reads, for the length and the pool that the engine chose."""
        return BatchingConfig(
            max_num_sequences=self.max_num_sequences,
            max_batch_tokens=self.max_batch_tokens,
            max_model_len=max_model_len,
            watermark_pages=int(self.page.watermark * num_pages),
            aging_interval_s=self.aging_interval_s,
            preemption_margin=self.preemption_margin,
            target_step_ms=self.target_step_ms,
        )
