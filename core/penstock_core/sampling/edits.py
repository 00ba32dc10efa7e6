"""Changes to logits, collected for a whole batch on the host and applied in a few calls on the logits' device.

Order: penalties, then bias, then bans and masks, so a banned token stays banned. Filled by `RowState.edit`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from penstock_core.sampling.noise import Int64

Values = npt.NDArray[np.float32]


class LogitEdits:
    """Collects edits by row of one logits tensor [rows, vocab]."""

    def __init__(self) -> None:
        self._penalties: list[tuple[int, Int64, Values, float]] = []
        self._biases: list[tuple[int, Int64, Values]] = []
        self._bans: list[tuple[int, Int64]] = []
        self._masks: list[tuple[int, npt.NDArray[np.bool_]]] = []

    def penalise(self, row: int, ids: Int64, subtract: Values, repetition: float) -> None:
        """Divide positive and multiply negative logits of distinct `ids` by `repetition`, then subtract."""
        self._penalties.append((row, ids, subtract, repetition))

    def bias(self, row: int, ids: Int64, add: Values) -> None:
        """Add to the logits of distinct `ids`."""
        self._biases.append((row, ids, add))

    def ban(self, row: int, ids: Int64) -> None:
        """Make `ids` impossible."""
        self._bans.append((row, ids))

    def keep(self, row: int, allowed: npt.NDArray[np.bool_]) -> None:
        """Make everything outside of `allowed` [vocab] impossible."""
        self._masks.append((row, allowed))

    def apply(self, logits: torch.Tensor) -> None:
        """Apply everything to `logits` in place: float32 [rows, vocab]."""

        def on_device(array: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array).to(logits.device)

        if self._penalties:
            rows, ids = _places([(row, ids) for row, ids, _, _ in self._penalties])
            index = on_device(rows), on_device(ids)
            factors = np.repeat(
                np.array([factor for _, _, _, factor in self._penalties], dtype=np.float32),
                [len(ids) for _, ids, _, _ in self._penalties],
            )
            factor = on_device(factors)
            found = logits[index]
            changed = torch.where(found > 0, found / factor, found * factor)
            logits[index] = changed - on_device(np.concatenate([subtract for _, _, subtract, _ in self._penalties]))
        if self._biases:
            rows, ids = _places([(row, ids) for row, ids, _ in self._biases])
            index = on_device(rows), on_device(ids)
            logits[index] = logits[index] + on_device(np.concatenate([add for _, _, add in self._biases]))
        for row, allowed in self._masks:
            logits[row].masked_fill_(on_device(~allowed), -torch.inf)
        if self._bans:
            rows, ids = _places(self._bans)
            logits[on_device(rows), on_device(ids)] = -torch.inf


def _places(parts: list[tuple[int, Int64]]) -> tuple[Int64, Int64]:
    rows = np.repeat(np.array([row for row, _ in parts], dtype=np.int64), [len(ids) for _, ids in parts])
    return rows, np.concatenate([ids for _, ids in parts])
