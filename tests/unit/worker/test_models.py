"""What `--model` may say, and what is said where it names nothing."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from penstock_worker import models
from penstock_worker.models import ModelUnavailable


def test_the_bundled_model_is_found_by_name() -> None:
    checkpoint = models.resolve("penstock-story")
    assert checkpoint.served_name == "penstock-story"
    assert (checkpoint.path / "model.safetensors").is_file()
    assert "penstock-story" in models.bundled_models()


def test_a_folder_is_served_under_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert models.resolve(str(folder)) == models.Checkpoint(folder, "my-model")


def test_a_folder_without_a_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config\.json"):
        models.resolve(str(tmp_path))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ModelUnavailable, match="penstock-story"):
        models.resolve("penstock-tragedy")


def test_a_hub_model_is_named_before_it_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **options: object) -> str:
        raise AssertionError("nothing may be downloaded for a name")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.served_name("owner/name") == "owner/name"
