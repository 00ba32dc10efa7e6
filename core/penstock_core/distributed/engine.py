"""DistributedInferenceEngine: the model, its pages, and one call per step that turns a TokenBatch into logits.

The pipeline loads it once and calls `forward` from the step loop. It decides nothing: which tokens, which pages and
which rows are wanted is in the batch. With several ranks this is rank 0: it tells the others each step.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from penstock_core.attention import LayerPages, usual_page_size
from penstock_core.batching import TokenBatch
from penstock_core.cache import PageConfig, PageShape, allocate_pages, move_pages, stored_dtype
from penstock_core.distributed import launch
from penstock_core.distributed.config import DistributedConfig
from penstock_core.distributed.followers import Followers
from penstock_core.distributed.graphs import LARGEST, CUDARecorder, DecodeGraphs
from penstock_core.distributed.group import ProcessGroup
from penstock_core.distributed.inputs import carry, choose_device, index_on_device, on_device
from penstock_core.distributed.measure import measure_activations
from penstock_core.distributed.memory import (
    MemoryReport,
    budget_bytes,
    check_weights_fit,
    estimated_activation_bytes,
    fit_pages,
    free_memory_bytes,
    taken_memory_bytes,
)
from penstock_core.distributed.messages import Order, cut, pack
from penstock_core.distributed.rendezvous import Place, Rendezvous
from penstock_core.models import DecoderModel, ModelConfig, Stage, find_checkpoint, load_model
from penstock_core.models.loading import choose_dtype
from penstock_core.models.products import Quantization
from penstock_core.protocol.errors import EngineFailed, InvalidConfiguration

_logger = logging.getLogger(__name__)

PROMPT_LOGIT_ROWS = 128  # prompt positions whose logits are held at a time
_LAST_WORDS_S = 2.0  # how long a dead rank's exit code may take to be known


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to load, where, and how much room to give it; see `PipelineConfig` for the fields."""

    model: Path | str
    device: str = "auto"
    dtype: str = "auto"
    quantization: Quantization | None = None
    max_model_len: int | None = None
    max_num_sequences: int = 64
    max_batch_tokens: int = 2048
    graphs: bool | None = None
    deterministic: bool = False
    threads: int | None = None
    page: PageConfig = field(default_factory=PageConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Of one forward pass: float32 logits [R, vocab] of the rows to be sampled."""

    logits: torch.Tensor


class DistributedInferenceEngine:
    """A loaded model with its page pool.

    Attributes:
        model: the decoder, or this rank's part of it. config: its `ModelConfig`.
        group: this process's place among the ranks; None where it is alone.
        num_pages, page_size, page_bytes: shape of the pool. num_host_pages: pages kept in host memory beside it.
        max_model_len: longest sequence in tokens.
        memory: what each rank's memory is used for, by rank.
    """

    def __init__(
        self, model: DecoderModel, config: EngineConfig, memory: MemoryReport, group: ProcessGroup | None
    ) -> None:
        """Take a loaded model and allocate its pages. `memory`: what is known so far.

        Raises:
            InvalidConfiguration: the pool cannot hold one sequence of `max_model_len` tokens, or steps are to be
                captured that cannot be.
        """
        page_size = usual_page_size(
            model.device, model.dtype, model.num_local_heads, model.num_local_kv_heads, model.config.head_dim
        )
        page = config.page.sized(page_size if group is None else group.least(page_size))
        self.model = model
        self.config: ModelConfig = model.config
        self.device = model.device
        self.group = group
        self._followers: Followers | None = None
        self._leads = group is not None and group.rank == 0
        self._hidden: torch.Tensor | None = None
        self._broken: str | None = None
        self._micro_batch_tokens = config.distributed.micro_batch_tokens
        self.max_model_len = self._choose_length(config.max_model_len, page)
        shape = PageShape(
            num_layers=model.num_local_layers,
            page_size=page.size,
            num_kv_heads=model.num_local_kv_heads,
            head_dim=model.config.head_dim,
            dtype=stored_dtype(page.kv_dtype, model.dtype),
        )
        self.page_size = page.size
        self.page_bytes = shape.page_bytes
        activations = memory.activations
        captures = config.graphs is not False and self.device.type == "cuda" and group is None
        if self.device.type == "cuda":
            activations = measure_activations(
                model,
                shape,
                tokens=config.max_batch_tokens,
                sequences=config.max_num_sequences,
                length=self.max_model_len,
                rows=max(config.max_num_sequences, PROMPT_LOGIT_ROWS),
            )
            if captures:  # graphs keep memory of their own
                decodes = min(config.max_num_sequences, LARGEST)
                activations += measure_activations(model, shape, tokens=decodes, sequences=decodes, length=1, rows=1)
        self.num_pages = fit_pages(
            page,
            shape,
            free=memory.free // (1 if group is None else group.ranks_here(self.device)) - memory.weights,
            budget=memory.budget,
            weights=memory.weights,
            activations=activations,
            max_model_len=self.max_model_len,
            max_num_sequences=config.max_num_sequences,
        )
        if group is not None:
            self.num_pages = group.least(self.num_pages)
        self.layers: list[LayerPages] = allocate_pages(shape, self.num_pages + captures, self.device)
        self._graphs: DecodeGraphs | None = None
        if captures:
            self._graphs = self._capture(config.max_num_sequences)
        if config.graphs and self._graphs is None:
            raise InvalidConfiguration(
                "graphs",
                "need a GPU, one rank, a model without experts, and pages that are read in place; leave it out",
            )
        self.num_host_pages = page.host_pages
        self.host_layers: list[LayerPages] = []
        if page.host_pages:
            pinned = self.device.type == "cuda"
            self.host_layers = allocate_pages(shape, page.host_pages, torch.device("cpu"), pinned=pinned)
        report = replace(
            memory,
            activations=activations,
            pages=self.num_pages * shape.page_bytes,
            host_pages=page.host_pages * shape.page_bytes,
        )
        self.memory = (report,) if group is None else group.tell_reports(report)

    @classmethod
    def load(
        cls, config: EngineConfig, progress: Callable[[int, int], None] | None = None
    ) -> DistributedInferenceEngine:
        """Load a checkpoint, with all its ranks. `progress` is called with (bytes loaded, bytes in all).

        The other ranks are started here, unless torchrun (or whoever set its variables) has started all.

        Raises:
            InvalidConfiguration: the weights or one sequence's pages do not fit the device's memory, or the ranks
                cannot be set up as asked.
            BrokenCheckpoint, UnsupportedModel: see `load_model`.
            EngineFailed: a rank did not come up.
        """
        distributed = config.distributed
        if distributed.num_ranks == 1:
            engine = cls._load_part(config, choose_device(config.device), None, progress)
        else:
            launch.check_ranks(config)
            place = Place.from_environment(os.environ)
            if place is None:
                engine = cls._load_with_followers(config, progress)
            else:
                launch.check_place(place, distributed)
                if place.rank > 0:
                    raise InvalidConfiguration(
                        "RANK",
                        f"is {place.rank}: only rank 0 serves; let this process follow (follow_from_environment)",
                    )
                engine = cls.load_rank(config, Rendezvous.over_tcp(place, distributed.timeout_s), progress)
        for report in engine.memory:
            _logger.info("memory of %s", report)
        return engine

    @classmethod
    def _load_with_followers(
        cls, config: EngineConfig, progress: Callable[[int, int], None] | None
    ) -> DistributedInferenceEngine:
        followers = Followers(config)
        try:
            engine = cls.load_rank(config, followers.rendezvous, progress)
        except Exception as error:
            fallen = None if isinstance(error, InvalidConfiguration | EngineFailed) else followers.fallen(_LAST_WORDS_S)
            followers.close(timeout_s=5.0)
            if fallen is None:
                raise
            raise EngineFailed(f"{fallen} while the model was loaded; its messages are above") from error
        followers.assembled()
        engine._followers = followers
        return engine

    @classmethod
    def load_rank(
        cls, config: EngineConfig, rendezvous: Rendezvous, progress: Callable[[int, int], None] | None = None
    ) -> DistributedInferenceEngine:
        """Join a group and load this rank's part; see `load`."""
        place = rendezvous.place
        rendezvous.agree(launch.claims(config))
        device = launch.device_of(config.device, place)
        if device.type == "cpu":
            torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // place.local_size))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model_config = ModelConfig.from_checkpoint(find_checkpoint(config.model))
        group = ProcessGroup(
            rendezvous,
            config.distributed,
            device,
            max_batch_tokens=config.max_batch_tokens,
            hidden_bytes=model_config.hidden_size * choose_dtype(config.dtype, model_config, device).itemsize,
            deterministic=config.deterministic,
        )
        try:
            return cls._load_part(config, device, group, progress)
        except BaseException:
            group.close()
            raise

    @classmethod
    def _load_part(
        cls,
        config: EngineConfig,
        device: torch.device,
        group: ProcessGroup | None,
        progress: Callable[[int, int], None] | None,
    ) -> DistributedInferenceEngine:
        distributed = config.distributed
        folder = find_checkpoint(config.model)
        model_config = ModelConfig.from_checkpoint(folder)
        here = 1 if group is None else group.ranks_here(device)
        expected = check_weights_fit(
            folder,
            model_config,
            device,
            config.dtype,
            config.quantization,
            ranks=distributed.num_ranks,
            ranks_here=here,
        )
        free, taken = free_memory_bytes(device), taken_memory_bytes(device)
        if group is not None:
            group.least(0)  # nobody loads before everybody has looked
        model = load_model(
            folder,
            device=device,
            dtype=config.dtype,
            quantization=config.quantization,
            group=None if group is None else group.tensor,
            stage=Stage() if group is None else group.stage,
            deterministic=config.deterministic,
            progress=progress,
        )
        memory = MemoryReport(
            rank=0 if group is None else group.rank,
            free=free,
            budget=budget_bytes(config.page, device, free, here),
            # An allocator may reuse what this process had freed before: then the files know better.
            weights=max(taken_memory_bytes(device) - taken, 0 if device.type == "cuda" else expected),
            activations=estimated_activation_bytes(
                model_config,
                tokens=config.max_batch_tokens,
                rows=max(config.max_num_sequences, PROMPT_LOGIT_ROWS),
                tensor_parallel=distributed.tensor_parallel,
                itemsize=model.dtype.itemsize,
            ),
            pages=0,
            host_pages=0,
        )
        return cls(model, config, memory, group)

    def forward(self, batch: TokenBatch, chosen: torch.Tensor | None = None) -> StepOutput:
        """Compute one step, on all ranks.

        Args:
            batch: the step.
            chosen: int64 [R] on the device, the tokens of the step before, where the batch carries some of them. One
                rank only.

        Raises:
            EngineFailed: the ranks do not move together any more; no further step is possible.
        """
        if self.group is None:
            return StepOutput(self.compute(batch, chosen))
        assert batch.carried is None, "tokens that only rank 0 has"
        with self._together():
            self.group.messages.send(Order.STEP, pack(batch))
            return StepOutput(self.compute(batch))

    def compute(self, batch: TokenBatch, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """This rank's part of a step: move pages, write the new keys and values, return the logits to be sampled.

        Only rank 0's logits are whole.
        """
        for sources, destinations, moves in (
            (self.layers, self.host_layers, batch.offloads),
            (self.host_layers, self.layers, batch.restores),
            (self.layers, self.layers, batch.copies),
        ):
            if moves:
                move_pages(sources, destinations, moves)
        if self._graphs is not None and self._graphs.fits(batch):
            self._hidden = self._graphs.run(batch, chosen)
        else:
            parts = [self._pass_through(part, chosen) for part in cut(batch, self._num_parts(batch.num_tokens))]
            self._hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.logits(None if len(batch.logit_rows) == batch.num_tokens else batch.logit_rows)

    def logits(self, rows: npt.NDArray[np.int64] | None) -> torch.Tensor:
        """Logits of some rows of the last step, or of all; on rank 0 whole, wherever they are computed."""
        assert self._hidden is not None
        count = len(self._hidden) if rows is None else len(rows)
        group, stage = self.group, self.model.stage
        logits = torch.empty(0, self.config.vocab_size, device=self.device)
        if stage.is_last and count:
            wanted = self._hidden
            if rows is not None:
                wanted = wanted.index_select(0, index_on_device(rows, self.device))
            logits = self.model.logits(wanted)
        if group is not None and group.results is not None and count:
            if stage.is_last:
                group.results.send(logits)
            else:
                logits = group.results.receive(torch.empty(count, self.config.vocab_size, device=self.device))
        if group is not None:
            group.flush()
        return logits

    def prompt_logits(self, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits of the last step's rows `first` to `last`, some at a time: (first row of the part, [n, vocab])."""
        for start in range(first, last, PROMPT_LOGIT_ROWS):
            end = min(start + PROMPT_LOGIT_ROWS, last)
            if self.group is None:
                yield start, self.logits(np.arange(start, end))
                continue
            with self._together():
                self.group.messages.send(Order.PROMPT_LOGITS, np.array([start, end], dtype=np.int32))
                logits = self.logits(np.arange(start, end))
            yield start, logits

    @property
    def num_ranks(self) -> int:
        """Processes that compute each step, this one included."""
        return 1 if self.group is None else self.group.size

    def fallen(self) -> str | None:
        """Which of the other ranks has ended, if one has: no further step is possible. Any thread."""
        return None if self.group is None else self._broken or self.group.fallen()

    def close(self) -> None:
        """End the other ranks, if there are any, and give captured steps up."""
        if self._graphs is not None:
            self._graphs.forget()
        group, self.group = self.group, None
        if group is None:
            return
        followers, self._followers = self._followers, None
        try:
            if self._leads and self._broken is None and group.fallen() is None:
                group.messages.send(Order.STOP, np.zeros(0, dtype=np.int32))
        except RuntimeError:  # one fell just now: the others notice by themselves
            pass
        finally:
            if followers is not None:
                followers.close(timeout_s=5.0)
            group.close()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A step that fails on one rank leaves the others in the middle of it: the group cannot go on."""
        if self._broken is not None:
            raise EngineFailed(f"the group of ranks is broken: {self._broken}")
        try:
            yield
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            if not isinstance(error, Exception):  # an interrupt
                raise
            if self._followers is not None:
                self._broken = self._followers.fallen(_LAST_WORDS_S) or self._broken
            raise EngineFailed(f"the group of ranks is broken: {self._broken}") from error

    def _capture(self, max_rows: int) -> DecodeGraphs | None:
        """Steps of one token per sequence, captured; None where that cannot be. The last page is nobody's."""
        if not self.model.capturable(self.layers):
            return None
        began = time.perf_counter()
        try:
            graphs = DecodeGraphs(
                lambda batch: self.model.forward(batch, self.layers),
                max_rows=max_rows,
                max_len=self.max_model_len,
                page_size=self.page_size,
                scratch_page=self.num_pages,
                device=self.device,
                recorder=CUDARecorder(self.device),
            )
        except RuntimeError as error:
            _logger.warning("decode steps could not be captured and run kernel by kernel", exc_info=error)
            return None
        _logger.info("captured decode steps in %.1f s", time.perf_counter() - began)
        return graphs

    def _pass_through(self, part: TokenBatch, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """One piece of a step through this stage's layers, from the stage before to the one after."""
        inputs = on_device(part, self.page_size, self.device)
        if part.carried is not None and chosen is not None:
            carry(part.carried, chosen, inputs.token_ids)
        group, hidden = self.group, None
        if group is not None and group.previous is not None:
            shape = part.num_tokens, self.config.hidden_size
            hidden = group.previous.receive(torch.empty(shape, dtype=self.model.dtype, device=self.device))
        hidden = self.model.forward(inputs, self.layers, hidden)
        if group is not None and group.following is not None:
            group.following.send(hidden)
        return hidden

    def _num_parts(self, num_tokens: int) -> int:
        """Into how many pieces a step is cut: enough to keep all stages busy, none too small to pay."""
        stages = self.model.stage.count
        return 1 if stages == 1 else max(1, min(4 * stages, num_tokens // self._micro_batch_tokens))

    def _choose_length(self, wanted: int | None, page: PageConfig) -> int:
        """`wanted`, or the model's own limit; shorter where an explicit pool is smaller than that."""
        longest = self.config.max_position
        if wanted is None:
            return longest if page.num_pages is None else min(longest, page.num_pages * page.size)
        if wanted > longest:
            raise InvalidConfiguration(
                "max_model_len", f"{wanted} is above the {longest} positions that {self.config.architecture} has here"
            )
        return wanted
