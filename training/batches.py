"""Packed batches: documents are encoded, laid end to end, and cut into rows, so that no position is padding."""

from collections.abc import Iterator

import torch
from tokenizers import Tokenizer

from training import corpus

_DOCUMENTS_PER_CALL = 64


class PackedStream:
    """An endless row of tokens from one split of the corpus; `next_batch` cuts the next rows off it."""

    def __init__(self, tokenizer: Tokenizer, seed: int, split: str = corpus.TRAIN) -> None:
        self._tokenizer = tokenizer
        self._documents: Iterator[corpus.Document] = corpus.documents(seed, split=split)
        self._pending: list[int] = []
        self.documents_read = 0

    def next_batch(self, rows: int, length: int) -> torch.Tensor:
        """Token ids `[rows, length + 1]`; the last column of a row is the first of the next, so no target is lost."""
        needed = rows * length + 1
        while len(self._pending) < needed:
            texts = [next(self._documents).text for _ in range(_DOCUMENTS_PER_CALL)]
            self.documents_read += len(texts)
            for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
                self._pending.extend(encoding.ids)
        flat = torch.tensor(self._pending[:needed])
        del self._pending[: rows * length]
        return flat.unfold(0, length + 1, length)
