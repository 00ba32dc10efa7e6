"""The committed checkpoints: small, complete, with one tokenizer that loses nothing and the corpus's own template."""

import json
import random
from pathlib import Path

import pytest

from training.markers import CHAT_TEMPLATE, SPECIAL_TOKENS

BUNDLED = Path(__file__).parents[2] / "worker/penstock_worker/bundled"
NAMES = ("penstock-story", "penstock-story-draft")


def read(name: str, file: str) -> dict[str, object]:
    record: dict[str, object] = json.loads((BUNDLED / name / file).read_text(encoding="utf-8"))
    return record


def test_package_data_stays_under_six_megabytes() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 6_000_000
    assert (BUNDLED / "penstock-story-draft/model.safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_config_carries_both_spellings(name: str) -> None:
    config = read(name, "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": config["rope_theta"]}
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["eos_token_id"] == read(name, "generation_config.json")["eos_token_id"]
    assert read(name, "tokenizer_config.json")["chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_finite_and_as_configured(name: str) -> None:
    numpy = pytest.importorskip("numpy")
    load_file = pytest.importorskip("safetensors.numpy").load_file
    config = read(name, "config.json")
    weights = load_file(BUNDLED / name / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert "lm_head.weight" not in weights
    assert all(w.dtype == numpy.float16 and numpy.isfinite(w).all() for w in weights.values())


def test_bundled_tokenizer_loses_no_character() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    files = [BUNDLED / name / "tokenizer.json" for name in NAMES]
    assert files[0].read_bytes() == files[1].read_bytes()
    tokenizer = tokenizers.Tokenizer.from_file(str(files[0]))
    assert tokenizer.get_vocab_size() == 2048
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    draw = random.Random(1)
    characters = [*range(1, 0xD800), *range(0xE000, 0x30000)]
    for _ in range(50):
        text = "".join(map(chr, draw.choices(characters, k=40)))
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", NAMES)
def test_card_states_license_and_how_to_retrain(name: str) -> None:
    card = (BUNDLED / name / "README.md").read_text(encoding="utf-8")
    assert "apache-2.0" in card.lower()
    assert "training.train" in card
