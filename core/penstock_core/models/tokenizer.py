"""Text to tokens and back, exactly as the checkpoint's tokenizer.json and tokenizer_config.json say.

A thin layer over the `tokenizers` library; equal to transformers' AutoTokenizer, which the parity tests hold. Knows
the bytes of each token, from which the streaming detokeniser works, and renders chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers

from penstock_core.models.chat_template import ChatTemplate
from penstock_core.models.errors import BrokenCheckpoint
from penstock_core.protocol.errors import InvalidRequest

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        backend: the `tokenizers` object itself, for libraries that want one.
        special_tokens: the named special tokens, such as `bos_token`, by name.
        special_ids: ids that decoding may skip.
        bos_token_id, eos_token_id, pad_token_id: None where the checkpoint names none.
    """

    def __init__(self, backend: Any, options: Mapping[str, Any], chat_template: str | None = None) -> None:
        """`options` is the content of tokenizer_config.json."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = {name: _content(options[name]) for name in _NAMED if options.get(name)}
        self._add_missing_tokens(options)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        self._added = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._template = None if chat_template is None else ChatTemplate(chat_template)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint folder.

        Raises:
            BrokenCheckpoint: a file is missing or not what it should be.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise BrokenCheckpoint(
                f"{file}: no such file; transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise BrokenCheckpoint(f"{file}: not a tokenizer ({error})") from error
        config = folder / "tokenizer_config.json"
        try:
            options = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        except ValueError as error:
            raise BrokenCheckpoint(f"{config}: not valid JSON ({error})") from None
        return cls(backend, options, _chat_template(folder, options))

    @property
    def vocab_size(self) -> int:
        """Number of tokens the tokenizer knows; the model's own vocabulary may be padded beyond it."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint came with a chat template."""
        return self._template is not None

    def to_json(self) -> str:
        """The whole tokenizer as the content of a tokenizer.json."""
        text: str = self.backend.to_str()
        return text

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special` adds what tokenizer.json puts around a text, usually a BOS token.

        tokenizer_config.json's `add_bos_token` counts for nothing beside a tokenizer.json, as in transformers 5.

        Raises:
            InvalidRequest: the text is not valid Unicode.
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("prompt", f"not valid Unicode text ({error}); remove lone surrogates") from error
        return ids

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of some tokens. Ids the tokenizer does not know give nothing."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special)
        return text

    def id_to_piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None for an unknown id."""
        piece: str | None = self.backend.id_to_token(token_id)
        return piece

    def piece_to_id(self, piece: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        token_id: int | None = self.backend.token_to_id(piece)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds in the middle of a text; may be part of a character. Empty for an unknown id."""
        piece = self.id_to_piece(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return piece.encode()
        if self.byte_level:
            table = _byte_of_character()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.replace("▁", " ").encode() if self._metaspace else self.decode([token_id], False).encode()

    @cached_property
    def byte_level(self) -> bool:
        """Whether pieces spell bytes as characters, as GPT-2 did."""
        return "ByteLevel" in self._decoders

    @cached_property
    def byte_fallback(self) -> bool:
        """Whether pieces such as `<0x0A>` stand for single bytes."""
        return "ByteFallback" in self._decoders

    @cached_property
    def strips_leading_space(self) -> bool:
        """Whether decoding drops one space at the very start of a text."""
        for decoder in self._decoder_list:
            if decoder["type"] == "Strip" and decoder.get("start", 0) > 0:
                return True
            if decoder["type"] == "Metaspace" and decoder.get("prepend_scheme") != "never":
                return True
        return False

    @cached_property
    def _metaspace(self) -> bool:
        return any(
            decoder["type"] == "Metaspace" or (decoder["type"] == "Replace" and decoder.get("content") == " ")
            for decoder in self._decoder_list
        )

    @cached_property
    def _decoder_list(self) -> list[dict[str, Any]]:
        decoder = json.loads(self.to_json()).get("decoder") or {"type": "none"}
        parts: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        return parts

    @cached_property
    def _decoders(self) -> set[str]:
        return {decoder["type"] for decoder in self._decoder_list}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation; encode it with `add_special=False`, the template adds its own BOS.

        Raises:
            InvalidRequest: there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest("messages", "this model has no chat template; send a prompt instead")
        return self._template.render(
            messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **self.special_tokens
        )

    def _named_id(self, name: str) -> int | None:
        return self.piece_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    def _add_missing_tokens(self, options: Mapping[str, Any]) -> None:
        """Tokens that tokenizer_config.json names and tokenizer.json lacks, at the ids it gives them."""
        declared: dict[str, Any] = options.get("added_tokens_decoder") or {}
        for index, token in sorted(declared.items(), key=lambda item: int(item[0])):
            fields = {"content": token} if isinstance(token, str) else dict(token)
            if self.piece_to_id(fields["content"]) is None:
                flags = {k: v for k, v in fields.items() if k in ("single_word", "lstrip", "rstrip", "normalized")}
                added = tokenizers.AddedToken(fields["content"], special=bool(fields.get("special", True)), **flags)
                self.backend.add_tokens([added])
                if self.piece_to_id(fields["content"]) != int(index):
                    raise BrokenCheckpoint(
                        f"tokenizer_config.json puts {fields['content']!r} at id {index}, "
                        f"tokenizer.json has room for it at {self.piece_to_id(fields['content'])}"
                    )
        extra = options.get("extra_special_tokens", options.get("additional_special_tokens")) or []
        contents = [*self.special_tokens.values(), *(_content(t) for t in extra if isinstance(t, str | Mapping))]
        self.backend.add_special_tokens([content for content in contents if self._must_add(content)])

    def _must_add(self, content: str) -> bool:
        """Whether a named special token is unknown, or known as an ordinary token."""
        index = self.piece_to_id(content)
        added = self.backend.get_added_tokens_decoder()
        return index is None or index not in added or not added[index].special


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _chat_template(folder: Path, options: Mapping[str, Any]) -> str | None:
    """The template of a checkpoint: its own file, or tokenizer_config.json's only or `default` one."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = options.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


@cache
def _byte_of_character() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
