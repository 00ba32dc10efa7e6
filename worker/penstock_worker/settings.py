"""The worker's settings: one typed object, filled from flags and `PENSTOCK_*` variables in `flags.py`.

Every field's description is its help text. Nothing else in the worker reads flags or the environment.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from penstock_worker.structured_log import LogFormat

_ID = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}$"
_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"


class WorkerSettings(BaseModel):
    """What one worker process needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    redis_url: Annotated[str, Field(description="where the queue lives: redis://, rediss:// or unix://")] = (
        "redis://localhost:6379/0"
    )
    model: Annotated[
        str, Field(min_length=1, description="a bundled model's name, a checkpoint folder, or a hub id (owner/name)")
    ] = "penstock-story"
    served_name: Annotated[
        str | None, Field(description="name requests may ask for; default: the model's own name")
    ] = None
    queue: Annotated[str | None, Field(description="queue to serve; default: the served name")] = None
    worker_id: Annotated[
        Annotated[str, StringConstraints(pattern=_ID)] | None,
        Field(description="unique id of this process's life; default: host and a random suffix"),
    ] = None
    supervisor_pid: Annotated[
        int | None, Field(ge=1, description="drain when this parent process is gone; set by --processes")
    ] = None
    processes: Annotated[int, Field(ge=1, le=256, description="workers to run and supervise")] = 1
    ranks: Annotated[
        int | None,
        Field(ge=1, le=1024, description="ranks to run and supervise, in groups of --tensor-parallel: a worker each"),
    ] = None
    gpus: Annotated[
        str | None,
        Field(pattern=r"^\d+(,\d+)*$", description="GPUs to run supervised ranks on, one each, such as 0,1,2,3"),
    ] = None

    device: Annotated[str, Field(pattern=_DEVICE, description="auto, cpu, cuda or cuda:<n>")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Field(description="arithmetic of weights and activations")
    ] = "auto"
    quantization: Annotated[Literal["none", "int8"], Field(description="weights stored as 8-bit integers")] = "none"
    threads: Annotated[
        int | None,
        Field(ge=1, le=1024, description="CPU threads of the engine; default: the cores, shared by processes"),
    ] = None
    max_model_len: Annotated[
        int | None, Field(ge=2, description="longest prompt plus output in tokens; default: what the model allows")
    ] = None
    max_num_sequences: Annotated[int, Field(ge=1, le=4096, description="sequences decoded together")] = 64
    max_batch_tokens: Annotated[int, Field(ge=16, le=1_048_576, description="tokens computed in one step")] = 2048
    kv_cache_tokens: Annotated[
        int | None, Field(ge=16, description="tokens the KV cache holds; default: what the memory allows")
    ] = None
    memory_fraction: Annotated[
        float | None,
        Field(
            gt=0, le=0.95, description="share of the device's free memory to use; default: 0.9 of a GPU, 0.5 of a CPU's"
        ),
    ] = None
    page_size: Annotated[
        int | None,
        Field(ge=1, le=1024, description="tokens in a page of the KV cache; default: 16, more where a GPU needs it"),
    ] = None
    prefix_cache: Annotated[bool, Field(description="reuse computed prefixes between requests")] = True
    host_pages: Annotated[
        int,
        Field(ge=0, le=2**31 - 1, description="pages of host memory for prefixes that the device has no room for"),
    ] = 0
    tensor_parallel: Annotated[
        int, Field(ge=1, le=64, description="processes or GPUs that each layer is cut over; rank 0 is the worker")
    ] = 1
    pipeline_parallel: Annotated[
        int,
        Field(
            ge=1, le=64, description="stages that the layers are cut into, of --tensor-parallel processes or GPUs each"
        ),
    ] = 1
    rank_timeout_s: Annotated[
        float,
        Field(
            ge=1,
            le=3600,
            allow_inf_nan=False,
            description="how long a rank waits for another that lives before its group ends; more than a step takes",
        ),
    ] = 120.0
    speculation: Annotated[
        Literal["off", "auto", "draft", "ngram", "suffix"],
        Field(description="who drafts tokens for the model to check; changes the speed, never the output"),
    ] = "off"
    draft_model: Annotated[
        str | None, Field(description="drafting model, as --model; default: the <model>-draft folder beside the model")
    ] = None
    draft_tokens: Annotated[int, Field(ge=1, le=64, description="most tokens drafted at once")] = 8
    target_step_ms: Annotated[
        float | None, Field(gt=0, description="hold the time between tokens near this by moving the token budget")
    ] = None
    batch_timeout_ms: Annotated[
        float,
        Field(
            ge=0, le=1000, description="longest that an idle engine holds a lone request when others are likely to come"
        ),
    ] = 0.0
    kv_dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16", "int8", "float8"],
        Field(description="precision of the KV cache"),
    ] = "auto"
    deterministic: Annotated[
        bool, Field(description="logits equal bit for bit whatever else is in the batch, at some cost of speed")
    ] = False

    lease_s: Annotated[
        float, Field(ge=0.5, le=3600, description="a job is reclaimed this long after its last renewal")
    ] = 15.0
    heartbeat_s: Annotated[float, Field(ge=0.1, le=60, description="how often the worker says that it lives")] = 0.5
    reclaim_tick_s: Annotated[
        float, Field(ge=0.05, le=60, description="how often lost workers and due retries are looked for")
    ] = 0.25
    max_crashes: Annotated[
        int | None,
        Field(
            ge=1,
            le=1000,
            description="set the queue's max_crashes: a job that took down this many workers is dead-lettered; "
            "default: leave it as it is (3 where nobody set it)",
        ),
    ] = None
    grace_s: Annotated[
        float, Field(ge=0, le=86_400, description="on SIGTERM, time to finish jobs before they are handed back")
    ] = 30.0
    publish_interval_ms: Annotated[
        float, Field(ge=0, le=20, description="least time between two publications of tokens; ends go out at once")
    ] = 5.0
    max_buffered_tokens: Annotated[
        int, Field(ge=1, description="tokens kept while Redis is away; beyond it the largest jobs are handed back")
    ] = 1_000_000

    metrics_port: Annotated[
        int | None, Field(ge=0, le=65_535, description="serve /metrics and /health on this port (0: any free one)")
    ] = None
    metrics_host: Annotated[str, Field(description="address for --metrics-port")] = "127.0.0.1"
    health_dir: Annotated[
        Path | None, Field(description="folder of the health file that `python -m penstock_worker.health` reads")
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="least severe lines to print")
    ] = "info"
    log_format: Annotated[LogFormat, Field(description="json, text, or auto: text on a terminal")] = "auto"

    @property
    def group_size(self) -> int:
        """Ranks that serve one model together."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def is_supervised(self) -> bool:
        """Whether this process is to run workers instead of being one."""
        return self.processes > 1 or self.ranks is not None or self.gpus is not None

    @property
    def lease_ms(self) -> int:
        """The lease in milliseconds."""
        return round(self.lease_s * 1000)


def new_worker_id(place: str | None = None) -> str:
    """An id never used before: a restarted worker must not be taken for the one that died."""
    host = re.sub(r"[^A-Za-z0-9_.\-]", "-", socket.gethostname())[:64].lstrip("_.-") or "host"
    middle = "" if place is None else f"-{place}"
    return f"{host}{middle}-{os.getpid()}-{secrets.token_hex(4)}"
