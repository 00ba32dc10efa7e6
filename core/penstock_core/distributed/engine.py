"""DistributedInferenceEngine: the model, its pages, and one call per step that turns a TokenBatch into logits.

The pipeline loads it once and calls `forward` from the step loop. It decides nothing: which tokens, which pages and
which rows are wanted is in the batch. With several ranks this is rank 0: it tells the others each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from penstock_core.attention import AttentionBatch, LayerPages
from penstock_core.batching import TokenBatch
from penstock_core.cache import PageConfig, PageShape, allocate_pages, choose_num_pages, move_pages, stored_dtype
from penstock_core.distributed.config import DistributedConfig
from penstock_core.distributed.followers import Followers
from penstock_core.distributed.group import GlooGroup, Order, pack, send
from penstock_core.distributed.memory import check_weights_fit, free_memory_bytes
from penstock_core.models import DecoderModel, ModelConfig, TensorParallelGroup, find_checkpoint, load_model
from penstock_core.models.products import Quantization
from penstock_core.protocol.errors import EngineFailed, InvalidConfiguration

PROMPT_LOGIT_ROWS = 128  # prompt positions whose logits are held at a time


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to load, where, and how much room to give it; see `PipelineConfig` for the fields."""

    model: Path | str
    device: str = "auto"
    dtype: str = "auto"
    quantization: Quantization | None = None
    max_model_len: int | None = None
    max_num_sequences: int = 64
    deterministic: bool = False
    page: PageConfig = field(default_factory=PageConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Of one forward pass: hidden states [T, hidden], and float32 logits [R, vocab] of the rows to be sampled."""

    hidden: torch.Tensor
    logits: torch.Tensor


class DistributedInferenceEngine:
    """A loaded model with its page pool.

    Attributes:
        model: the decoder. config: its `ModelConfig`.
        group: this process's place among the ranks.
        num_pages, page_size, page_bytes: shape of the pool. num_host_pages: pages kept in host memory beside it.
        max_model_len: longest sequence in tokens.
    """

    def __init__(
        self, model: DecoderModel, page: PageConfig, max_model_len: int | None = None, max_num_sequences: int = 64
    ) -> None:
        """Take a loaded model and allocate its pages.

        Raises:
            InvalidConfiguration: the pool cannot hold one sequence of `max_model_len` tokens.
        """
        self.model = model
        self.config: ModelConfig = model.config
        self.device = model.device
        self.group = model.group
        self._followers: Followers | None = None
        self.max_model_len = self._choose_length(max_model_len, page)
        shape = PageShape(
            num_layers=model.config.num_layers,
            page_size=page.page_size,
            num_kv_heads=model.num_local_kv_heads,
            head_dim=model.config.head_dim,
            dtype=stored_dtype(page.kv_dtype, model.dtype),
        )
        self.page_size = page.page_size
        self.page_bytes = shape.page_bytes
        free = free_memory_bytes(self.device) // self.group.size
        self.num_pages = choose_num_pages(page, shape.page_bytes, free, self.max_model_len, max_num_sequences)
        if isinstance(self.group, GlooGroup):
            self.num_pages = self.group.least(self.num_pages)
        self.layers: list[LayerPages] = allocate_pages(shape, self.num_pages, self.device)
        self.num_host_pages = page.host_pages
        self.host_layers: list[LayerPages] = []
        if page.host_pages:
            pinned = self.device.type == "cuda"
            self.host_layers = allocate_pages(shape, page.host_pages, torch.device("cpu"), pinned=pinned)

    @classmethod
    def load(
        cls, config: EngineConfig, progress: Callable[[int, int], None] | None = None
    ) -> DistributedInferenceEngine:
        """Load a checkpoint, with all its ranks. `progress` is called with (bytes loaded, bytes in all).

        Raises:
            InvalidConfiguration: the weights or one sequence's pages do not fit the device's memory.
            BrokenCheckpoint, UnsupportedModel: see `load_model`.
            EngineFailed: a rank did not come up.
        """
        size = config.distributed.tensor_parallel
        if size == 1:
            return cls.load_rank(config, TensorParallelGroup(), progress)
        if choose_device(config.device).type != "cpu":
            raise InvalidConfiguration(
                "distributed.tensor_parallel",
                f"{size} ranks are supported on the CPU only so far; set device to cpu, or use 1",
            )
        folder = find_checkpoint(config.model)
        TensorParallelGroup(0, size).check(ModelConfig.from_checkpoint(folder))
        followers = Followers(config, size)
        try:
            group = GlooGroup(0, size, followers.rendezvous, config.distributed.timeout_s)
            engine = cls.load_rank(config, group, progress)
        except Exception as error:
            fallen = followers.fallen()
            followers.close(timeout_s=5.0)
            if fallen is None or isinstance(error, InvalidConfiguration):
                raise
            raise EngineFailed(f"{fallen} while the model was loaded; its messages are above") from error
        engine._followers = followers
        return engine

    @classmethod
    def load_rank(
        cls, config: EngineConfig, group: TensorParallelGroup, progress: Callable[[int, int], None] | None = None
    ) -> DistributedInferenceEngine:
        """Load one rank's slice; see `load`."""
        device = choose_device(config.device)
        folder = find_checkpoint(config.model)
        model_config = ModelConfig.from_checkpoint(folder)
        check_weights_fit(folder, model_config, device, config.dtype, config.quantization)
        model = load_model(
            folder,
            device=device,
            dtype=config.dtype,
            quantization=config.quantization,
            group=group,
            deterministic=config.deterministic,
            progress=progress,
        )
        return cls(model, config.page, config.max_model_len, config.max_num_sequences)

    def forward(self, batch: TokenBatch) -> StepOutput:
        """Compute one step, on all ranks.

        Raises:
            EngineFailed: the ranks do not move together any more; no further step is possible.
        """
        if self._followers is None:
            return self.compute(batch)
        with self._together(self._followers):
            send(Order.STEP, pack(batch))
            return self.compute(batch)

    def compute(self, batch: TokenBatch) -> StepOutput:
        """This rank's part of a step: move pages, write the new keys and values, return what is to be sampled."""
        for sources, destinations, moves in (
            (self.layers, self.host_layers, batch.offloads),
            (self.host_layers, self.layers, batch.restores),
            (self.layers, self.layers, batch.copies),
        ):
            if moves:
                move_pages(sources, destinations, moves)
        inputs, logit_rows = on_device(batch, self.page_size, self.device)
        hidden = self.model.forward(inputs, self.layers)
        sampled = hidden if len(logit_rows) == len(hidden) else hidden.index_select(0, logit_rows)
        return StepOutput(hidden, self.model.logits(sampled))

    def prompt_logits(self, hidden: torch.Tensor, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits of the step's rows `first` to `last`, some at a time: (first row of the part, [n, vocab])."""
        for start in range(first, last, PROMPT_LOGIT_ROWS):
            end = min(start + PROMPT_LOGIT_ROWS, last)
            if self._followers is None:
                logits = self.model.logits(hidden[start:end])
            else:
                with self._together(self._followers):
                    send(Order.PROMPT_LOGITS, np.array([start, end]))
                    logits = self.model.logits(hidden[start:end])
            yield start, logits

    @property
    def num_ranks(self) -> int:
        """Processes that compute each step, this one included."""
        return self.group.size

    def fallen(self) -> str | None:
        """Which of the other ranks has ended, if one has: no further step is possible. Any thread."""
        followers = self._followers
        return None if followers is None else followers.fallen()

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self._followers is None:
            return
        followers, self._followers = self._followers, None
        try:
            if followers.fallen() is None:
                send(Order.STOP, np.zeros(0, dtype=np.int64))
        except RuntimeError:  # one fell just now: the others notice by themselves
            pass
        finally:
            followers.close(timeout_s=5.0)
            if isinstance(self.group, GlooGroup):
                self.group.close()

    @contextmanager
    def _together(self, followers: Followers) -> Iterator[None]:
        """A step that fails on one rank leaves the others in the middle of it: the group cannot go on."""
        try:
            yield
        except Exception as error:
            reason = followers.fallen() or f"{type(error).__name__}: {error}"
            raise EngineFailed(f"the tensor-parallel group is broken: {reason}") from error

    def _choose_length(self, wanted: int | None, page: PageConfig) -> int:
        """`wanted`, or the model's own limit; shorter where an explicit pool is smaller than that."""
        longest = self.config.max_position
        if wanted is None:
            return longest if page.num_pages is None else min(longest, page.num_pages * page.page_size)
        if wanted > longest:
            raise InvalidConfiguration(
                "max_model_len", f"{wanted} is above the {longest} positions that {self.config.architecture} has here"
            )
        return wanted


def on_device(batch: TokenBatch, page_size: int, device: torch.device) -> tuple[AttentionBatch, torch.Tensor]:
    """A step's inputs as tensors, and the rows [R] whose logits are wanted.

    On the CPU the tensors share the batch's arrays. Elsewhere everything travels in one copy, from pinned memory that
    PyTorch does not reuse before the copy is done.
    """
    parts = (
        batch.token_ids,
        batch.positions,
        batch.slot_mapping,
        batch.logit_rows,
        batch.query_start,
        batch.seq_lens,
        batch.block_table.reshape(-1),
    )
    tensors: Sequence[torch.Tensor]
    if device.type == "cpu":
        tensors = [torch.from_numpy(part) for part in parts]
    else:
        flat = torch.from_numpy(np.concatenate(parts)).pin_memory().to(device, non_blocking=True)
        tensors = torch.split(flat, [len(part) for part in parts])
    token_ids, positions, slot_mapping, logit_rows, query_start, seq_lens, block_table = tensors
    inputs = AttentionBatch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        query_start=query_start.to(torch.int32),
        seq_lens=seq_lens.to(torch.int32),
        block_table=block_table.to(torch.int32).view(batch.block_table.shape),
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
        page_size=page_size,
    )
    return inputs, logit_rows


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidConfiguration("device", f"{name!r} is unknown; use auto, cpu, cuda or cuda:<n>") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidConfiguration("device", f"{name!r} is not supported; use auto, cpu, cuda or cuda:<n>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InvalidConfiguration("device", f"{name!r} is not there, {found} CUDA devices are; use cpu")
    return device
