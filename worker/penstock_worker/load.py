"""From settings to a running engine: the pipeline's configuration, the weights, a progress bar where somebody watches.

Runs in a thread of its own, because weights take long and the event loop has signals to hear.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from penstock_core.cache import PageConfig
from penstock_core.distributed import DistributedConfig
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig, UnifiedInferencePipeline
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.speculative import SpeculationConfig
from penstock_worker.engine import Engine
from penstock_worker.models import Checkpoint, resolve
from penstock_worker.settings import WorkerSettings

T = TypeVar("T")


def pipeline_config(settings: WorkerSettings, checkpoint: Checkpoint) -> PipelineConfig:
    """The engine's configuration; raises `InvalidConfiguration` where settings contradict each other."""
    if settings.host_pages and not settings.prefix_cache:
        raise InvalidConfiguration(
            "--host-pages", "keep prefixes, which --no-prefix-cache forgets; leave one of them out"
        )
    page = PageConfig(
        page_size=settings.page_size,
        num_tokens=settings.kv_cache_tokens,
        kv_dtype=settings.kv_dtype,
        memory_fraction=settings.memory_fraction,
        host_pages=settings.host_pages,
    )
    speculation = None
    if settings.speculation != "off":
        draft_model = None if settings.draft_model is None else resolve(settings.draft_model, "--draft-model").path
        speculation = SpeculationConfig(
            proposer=settings.speculation, draft_model=draft_model, max_depth=settings.draft_tokens
        )
    elif settings.draft_model is not None:
        raise InvalidConfiguration("--draft-model", "drafts nothing while --speculation is off; set it to auto")
    return PipelineConfig(
        model=checkpoint.path,
        served_name=settings.served_name or checkpoint.served_name,
        device=settings.device,
        dtype=settings.dtype,
        quantization=None if settings.quantization == "none" else settings.quantization,
        max_model_len=settings.max_model_len,
        max_num_sequences=settings.max_num_sequences,
        max_batch_tokens=settings.max_batch_tokens,
        page=page,
        prefix_cache=settings.prefix_cache,
        speculation=speculation,
        distributed=DistributedConfig(
            tensor_parallel=settings.tensor_parallel,
            pipeline_parallel=settings.pipeline_parallel,
            timeout_s=settings.rank_timeout_s,
        ),
        deterministic=settings.deterministic,
        target_step_ms=settings.target_step_ms,
        batch_timeout_ms=settings.batch_timeout_ms,
        threads=settings.threads or _share_of_cores(settings),
    )


def _share_of_cores(settings: WorkerSettings) -> int | None:
    """CPU threads of each rank, where the ranks of this worker have the machine's cores to share."""
    return None if settings.group_size == 1 else max(1, (os.cpu_count() or 1) // settings.group_size)


def load_engine(config: PipelineConfig) -> Engine:
    """Load the weights; raises what `UnifiedInferencePipeline` does."""
    with _progress_bar() as progress:
        return InferencePipelineExecutor(UnifiedInferencePipeline(config, progress=progress))


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """The result of `function`, computed in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(deliver: Callable[[Any], None], value: object) -> None:
        if not future.cancelled():
            deliver(value)

    def report(deliver: Callable[[Any], None], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(settle, deliver, value)

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # it is raised again where the result is awaited
            report(future.set_exception, error)
        else:
            report(future.set_result, result)

    threading.Thread(target=work, name="penstock-load", daemon=True).start()
    return await future


class _ProgressBar:
    """A bar on stderr that follows (bytes loaded, bytes in all)."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("load", total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return self._advance

    def __exit__(self, *reason: object) -> None:
        self._bar.stop()

    def _advance(self, loaded: int, total: int) -> None:
        self._bar.update(self._task, completed=loaded, total=total)


def _progress_bar() -> _ProgressBar | contextlib.nullcontext[None]:
    return _ProgressBar() if sys.stderr.isatty() else contextlib.nullcontext()
