"""Our tokenizer gives what transformers' AutoTokenizer gives on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from penstock_core.models import BrokenCheckpoint, Tokenizer
from penstock_core.protocol.errors import InvalidRequest

pytestmark = pytest.mark.parity

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "naïve café über Größe 日本語のテキスト 한국어 emoji 🎉🚀👩‍👩‍👧 привет мир",
    "def f(x):\n    return x ** 2  # code\n\n\tdone 1234567890",
] * 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] | trim }}"
    "{% if m.tags %}{{ m.tags | tojson }}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As sentencepiece models converted for Llama 2 and Gemma look."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[::3], trainer)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in special[:3]
    content["added_tokens"] = content["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def framed(tokenizer: tokenizers.Tokenizer, single: str) -> tokenizers.Tokenizer:
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def save(folder: Path, backend: tokenizers.Tokenizer, **options: Any) -> Path:
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | options))
    return folder


def of_class(name: str, backend: Callable[[], tokenizers.Tokenizer]) -> Callable[[Path], Path]:
    """As a family's own tokenizer class writes it."""

    def write(folder: Path) -> Path:
        model = json.loads(backend().to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        tokenizer = getattr(transformers, name)(vocab=model["vocab"], merges=merges, chat_template=TEMPLATE)
        tokenizer.save_pretrained(folder)
        return folder

    return write


KINDS: dict[str, Callable[[Path], Path]] = {
    "byte level": lambda folder: save(folder, byte_level(), pad_token="<pad>"),
    "byte level, framed": lambda folder: save(folder, framed(byte_level(), "<s>:0 $A:0 </s>:0")),
    "byte level, bos in the config only": lambda folder: save(folder, byte_level(), add_bos_token=True),
    "byte fallback": lambda folder: save(folder, byte_fallback(), unk_token="<unk>"),
    "byte fallback, with bos": lambda folder: save(
        folder, framed(byte_fallback(), "<s>:0 $A:0"), unk_token="<unk>", add_bos_token=False
    ),
    "LlamaTokenizer": of_class("LlamaTokenizer", byte_fallback),
    "GemmaTokenizer": of_class("GemmaTokenizer", byte_fallback),
    "Qwen2Tokenizer": of_class("Qwen2Tokenizer", byte_level),
    "tokens added in the config": lambda folder: save(
        folder,
        byte_level(),
        added_tokens_decoder={
            "400": {"content": "<|user|>", "special": True},
            "401": {"content": "<tool>", "special": False, "normalized": False, "lstrip": True},
        },
        additional_special_tokens=["<|extra|>"],
    ),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = request.param(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_checkpoint(folder), transformers.AutoTokenizer.from_pretrained(folder)


TEXTS = st.one_of(
    st.text(), st.lists(st.sampled_from([*CORPUS, "<s>", "</s>", "<|user|>", " ", "  ", "\n"])).map("".join)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_encoding_and_decoding_equal_transformers(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = pair
    for add_special in (True, False):
        ids = ours.encode(text, add_special)
        assert ids == reference.encode(text, add_special_tokens=add_special)
        for skip in (True, False):
            assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_token_bytes_joined_are_the_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, _ = pair
    ids = ours.encode(text, add_special=False)
    joined = b"".join(map(ours.token_bytes, ids)).decode()
    if ours.strips_leading_space:
        joined = joined.removeprefix(" ")
    assert joined == ours.decode(ids, skip_special=False)


def test_named_tokens_equal_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    assert (ours.bos_token_id, ours.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    assert ours.pad_token_id == reference.pad_token_id
    assert ours.vocab_size == len(reference)
    assert ours.special_ids >= set(reference.all_special_ids)


def test_chat_template_equals_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    messages = [
        {"role": "user", "content": " Grüße & <b> "},
        {"role": "assistant", "content": "ok", "tags": {"a": "ü<"}, "name": None},
        {"role": "user", "content": "more"},
    ]
    for prompt in (True, False):
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_what_a_template_refuses_names_its_reason(pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(InvalidRequest, match="messages: refused by the model's chat template: no wizard"):
        pair[0].apply_chat_template([{"role": "wizard", "content": "x"}])


def test_lone_surrogates_are_refused(pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        pair[0].encode("a\ud800b")


def test_a_folder_without_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="save_pretrained"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BrokenCheckpoint, match="not a tokenizer"):
        Tokenizer.from_checkpoint(tmp_path)
