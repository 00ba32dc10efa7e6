"""From what `--model` says to a checkpoint folder: a bundled model, a local folder, or a download from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock_core.protocol.errors import PenstockError

BUNDLED = Path(__file__).parent / "bundled"


class ModelUnavailable(PenstockError):
    """No checkpoint could be found, downloaded or loaded under this name."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder and the name its model is served under."""

    path: Path
    served_name: str


def bundled_models() -> list[str]:
    """Names of the models that come with the worker."""
    return sorted(folder.name for folder in BUNDLED.glob("*/") if (folder / "config.json").is_file())


def served_name(model: str) -> str:
    """The name a model is served under, unless set otherwise; downloads nothing.

    Raises:
        ModelUnavailable: nothing can be meant by `model`.
    """
    return model if _is_hub_id(model) else resolve(model).served_name


def resolve(model: str, flag: str = "--model") -> Checkpoint:
    """Find the checkpoint `model` names: bundled first, then a folder, then the hub. `flag` is who asks, for messages.

    Raises:
        ModelUnavailable: with what was tried and what would help.
    """
    if model in bundled_models():
        return Checkpoint(BUNDLED / model, model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelUnavailable(f"{flag}: {folder} has no config.json; give the folder of a safetensors checkpoint")
        return Checkpoint(folder, folder.resolve().name)
    if _is_hub_id(model):
        return Checkpoint(_download(model, flag), model)
    known = ", ".join(bundled_models()) or "none"
    raise ModelUnavailable(
        f"{flag}: {model!r} is neither a bundled model ({known}), nor a folder, nor a hub id of the form owner/name"
    )


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).is_dir()


def _download(hub_id: str, flag: str) -> Path:
    from penstock_core.models import BrokenCheckpoint, UnsupportedModel, find_checkpoint  # loads torch

    try:
        return find_checkpoint(hub_id)
    except (BrokenCheckpoint, UnsupportedModel) as error:
        raise ModelUnavailable(f"{flag}: {error}") from error
