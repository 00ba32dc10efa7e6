"""Checkpoints from the hub, into the hub's own cache: only the files that are read, and never code.

First what describes the model, so that one that cannot run is refused before its weights are fetched; then the weights
that its index names: many repositories hold a second copy of them in another form.
"""

from __future__ import annotations

import json
from pathlib import Path

from penstock_core.models.config import ModelConfig
from penstock_core.models.errors import BrokenCheckpoint

_INDEX = "model.safetensors.index.json"
_DESCRIPTION = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", _INDEX,
)  # fmt: skip


def download(hub_id: str) -> Path:
    """The folder of `owner/name` in the hub's cache, which is asked first where the hub cannot be reached.

    HF_ENDPOINT names another hub, HF_HOME another place for the cache, HF_TOKEN the key to gated models.

    Raises:
        BrokenCheckpoint: there is no such model, or it cannot be fetched.
        UnsupportedModel: it is not one that runs here; its weights were not fetched.
    """
    described = _fetch(hub_id, None, list(_DESCRIPTION))
    ModelConfig.from_checkpoint(described)
    index = described / _INDEX
    weights = _shards(index) if index.exists() else ["*.safetensors"]
    return _fetch(hub_id, described.name, weights)  # the folder is named after the commit: both are of one


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise BrokenCheckpoint(f"{index}: not a safetensors index (no weight_map)") from None


def _fetch(hub_id: str, revision: str | None, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=names, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise BrokenCheckpoint(f"{hub_id}: its owner asks who you are; accept its terms and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise BrokenCheckpoint(
            f"{hub_id}: the hub has no such model, or not for you; check its spelling, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise BrokenCheckpoint(
            f"{hub_id}: not in the local cache, and the hub did not give it ({_reason(error.__cause__ or error)}); "
            "connect, or give a folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{hub_id}: cannot be downloaded: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
