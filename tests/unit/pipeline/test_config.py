"""Settings are checked when they are made, and refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from penstock_core.cache import PageConfig
from penstock_core.distributed import DistributedConfig
from penstock_core.pipeline import PipelineConfig
from penstock_core.protocol.errors import InvalidConfiguration


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"threads": 0}, "threads"),
        ({"batch_timeout_ms": -1.0}, "batch_timeout_ms"),
        ({"max_num_sequences": 0}, "max_num_sequences"),
        ({"max_num_sequences": 64, "max_batch_tokens": 63}, "max_batch_tokens"),
        ({"aging_interval_s": 0.0}, "aging_interval_s"),
        ({"preemption_margin": -0.1}, "preemption_margin"),
        ({"target_step_ms": 0.0}, "target_step_ms"),
    ],
)
def test_pipeline_settings(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfiguration) as refused:
        PipelineConfig("model", **options)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"page_size": 0}, "page.page_size"),
        ({"num_pages": 0}, "page.num_pages"),
        ({"memory_fraction": 1.0}, "page.memory_fraction"),
        ({"kv_dtype": "int4"}, "page.kv_dtype"),
        ({"watermark": 0.9}, "page.watermark"),
    ],
)
def test_page_settings(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfiguration) as refused:
        PageConfig(**options)
    assert refused.value.field == field


def test_process_group_settings() -> None:
    with pytest.raises(InvalidConfiguration, match=r"distributed\.tensor_parallel"):
        DistributedConfig(tensor_parallel=0)


def test_served_name_is_the_folder_unless_given() -> None:
    assert PipelineConfig("owner/some-model").name == "some-model"
    assert PipelineConfig("owner/some-model", served_name="mine").name == "mine"
