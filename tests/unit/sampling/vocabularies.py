"""Small tokenizers of the kinds checkpoints come with, built in memory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import penstock_core
from penstock_core.models.tokenizer import Tokenizer as ModelTokenizer

BUNDLED = Path(penstock_core.__file__).parents[2] / "worker/penstock_worker/bundled/penstock-story"

CORPUS = [
    "The old miller opened the sluice gate, and the water ran down the penstock.",
    "Ångström, naïve café — 你好，世界！ 안녕하세요 мир 🙂👩‍👩‍👧‍👦🇳🇴 e\u0301",
    "def f(x):\n    return {'a': [1, 2, 3]}\n\n",
] * 4


@cache
def byte_level() -> ModelTokenizer:
    """GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    return ModelTokenizer(tokenizer, {"bos_token": "<s>", "eos_token": "</s>"})


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=200, limit_alphabet=60)
    trained.train_from_iterator(CORPUS[::3] * 4, trainer)
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = trained.get_vocab()
    vocabulary += [piece for piece in sorted(learned, key=lambda piece: learned[piece]) if piece not in vocabulary]
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    return {piece: index for index, piece in enumerate(vocabulary)}, merges


@cache
def sentencepiece() -> ModelTokenizer:
    """Llama 2's kind: spaces are `▁`, unknown characters fall back to bytes, a leading space is dropped."""
    vocabulary, merges = _pieces()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return ModelTokenizer(tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@cache
def gemma() -> ModelTokenizer:
    """Gemma's kind: as sentencepiece, but a leading space stays."""
    vocabulary, merges = _pieces()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return ModelTokenizer(tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@cache
def words() -> ModelTokenizer:
    """A decoder that looks at neighbours: BERT's WordPiece."""
    pieces = ["[UNK]", "the", "sl", "##ui", "##ce", "gate", ",", "open", "##ed", "water", "ran", ".", "a", "b", "##c"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return ModelTokenizer(tokenizer, {"unk_token": "[UNK]"})


@cache
def bundled() -> ModelTokenizer:
    """The bundled model's."""
    return ModelTokenizer.from_checkpoint(BUNDLED)
