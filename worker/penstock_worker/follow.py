"""A rank above 0 of a group that torchrun started: it follows rank 0, which is the worker, and knows no Redis."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from penstock_core.protocol.errors import EngineFailed, InvalidConfiguration
from penstock_worker.exit_codes import ExitCode
from penstock_worker.settings import WorkerSettings

_logger = logging.getLogger(__name__)

_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_follower(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, or someone who sets the same variables, started this process as a rank above 0."""
    return _launched(environment) and environment["RANK"] != "0"


def mismatch(settings: WorkerSettings, environment: Mapping[str, str]) -> str | None:
    """Why the flags do not fit the group that this process was started in; None where they do."""
    if not _launched(environment):
        return None
    if settings.is_supervised:
        return "--processes, --ranks and --gpus start processes of their own; under torchrun leave them out"
    size = environment["WORLD_SIZE"]
    if size != str(settings.group_size):
        return (
            f"torchrun started {size} processes, and --tensor-parallel {settings.tensor_parallel} times "
            f"--pipeline-parallel {settings.pipeline_parallel} makes {settings.group_size} ranks; make them the same"
        )
    return None


def run(settings: WorkerSettings) -> ExitCode:
    """Follow until rank 0 says stop, or is gone."""
    from penstock_core.distributed import follow_from_environment
    from penstock_core.models import BrokenCheckpoint, UnsupportedModel
    from penstock_worker.load import pipeline_config
    from penstock_worker.models import ModelUnavailable, resolve

    try:
        follow_from_environment(pipeline_config(settings, resolve(settings.model)).engine())
    except (ModelUnavailable, BrokenCheckpoint, UnsupportedModel, InvalidConfiguration) as error:
        _logger.error("%s", error)
        return ExitCode.MODEL
    except (EngineFailed, RuntimeError) as error:
        _logger.error("this rank ends with its group: %s", error)
        return ExitCode.ENGINE
    return ExitCode.OK


def _launched(environment: Mapping[str, str]) -> bool:
    return all(environment.get(name) for name in _SET_BY_TORCHRUN)
