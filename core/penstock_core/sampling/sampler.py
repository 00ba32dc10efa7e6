"""The stateless sampler: logits in, one token per row out, and nothing remembered in between.

token = argmax over the tokens left by the filters of `logit / temperature + Gumbel noise`, the noise a pure function of
(seed, choice, position, token id); greedy is the same without noise. A row's token therefore depends on its own logits
and options only: not on the batch, the worker or the attempt, and a drafted token is right exactly when it equals it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from penstock_core.kernels.native import kernels
from penstock_core.protocol.jobs import TokenLogprob
from penstock_core.sampling import dense
from penstock_core.sampling.filters import filter_floors
from penstock_core.sampling.logprobs import Logprobs, raw_logprobs
from penstock_core.sampling.noise import Int64, position_keys
from penstock_core.sampling.race import Float32, block_maxima, draw, draw_natively
from penstock_core.sampling.table import SamplingTable

NO_TOKEN = -1
"""Chosen where nothing can be: the options leave no token, or logits are not finite; the choice ends in `error`."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Chosen tokens [R], int64; `NO_TOKEN` where there is none to choose."""

    token_ids: Int64
    logprobs: Logprobs | None = None

    def logprob(self, index: int) -> TokenLogprob | None:
        """The log-probability record of row `index`, if it was asked for."""
        return None if self.logprobs is None else self.logprobs.at(index)


class Sampler:
    """Chooses tokens for rows of a `SamplingTable`. Holds nothing but the table's width."""

    @torch.inference_mode()
    def sample(
        self,
        table: SamplingTable,
        logits: torch.Tensor,
        rows: Int64,
        positions: Int64,
        drafts: Int64 | None = None,
        *,
        with_logprobs: bool = True,
    ) -> SampledTokens:
        """Choose one token per row of logits.

        Args:
            table: the options of all sequences.
            logits: float32 [R, vocab]; used up (edited in place) by rows with penalties, bias or masks.
            rows: [R], the table row of each. Several rows of one sequence stand together, positions ascending.
            positions: [R], index of the output token being chosen; 0 is the sequence's first.
            drafts: [R], the drafted token each row's context ends with, or -1 where it ends with the sequence's last
                accepted token (every sequence's first row). None: no drafts at all.
            with_logprobs: False leaves log-probabilities out even where they were asked for.
        """
        asking = np.flatnonzero(table.logprobs[rows] >= (0 if with_logprobs else np.inf))
        editing = table.stateful(rows)
        raw = logits[torch.from_numpy(asking)].cpu().numpy() if len(asking) else None
        if editing.any():
            none = np.full(len(rows), -1, dtype=np.int64)
            table.edits(rows, positions, none if drafts is None else drafts).apply(logits)
        if logits.device.type == "cpu":
            tokens = _choose(table, logits.numpy(), rows, positions)
        else:
            tokens = dense.choose(table, logits, rows, positions).cpu().numpy()
        if raw is None:
            return SampledTokens(tokens)
        place = np.full(len(rows), -1, dtype=np.int64)
        place[asking] = np.arange(len(asking))
        records = raw_logprobs(raw, np.maximum(tokens[asking], 0), table.logprobs[rows[asking]], place)
        return SampledTokens(tokens, records)

    @torch.inference_mode()
    def launch(self, table: SamplingTable, logits: torch.Tensor, rows: Int64, positions: Int64) -> torch.Tensor | None:
        """`sample` for rows without drafts, whose tokens stay on the logits' device: int64 [R], nobody waits for them.

        None where that cannot be: some row's options look at the tokens before, change logits, want log-probabilities,
        or (on a GPU) filter by top-k or top-p.
        """
        if table.stateful(rows).any() or (table.logprobs[rows] >= 0).any():
            return None
        if logits.device.type == "cpu":
            return torch.from_numpy(_choose(table, logits.numpy(), rows, positions))
        return None if dense.waits(table, rows) else dense.choose(table, logits, rows, positions)


def _choose(table: SamplingTable, logits: Float32, rows: Int64, positions: Int64) -> Int64:
    """Choose on the host. Greedy rows are split off: they pay for no noise."""
    greedy = table.greedy[rows]
    if greedy.all():
        tokens: Int64 = logits.argmax(-1)  # the first, that is the lowest id, of equals
        tokens[~np.isfinite(logits[np.arange(len(rows)), tokens])] = NO_TOKEN
        return tokens
    tokens = np.full(len(rows), NO_TOKEN, dtype=np.int64)
    most_likely = logits[greedy].argmax(-1)
    most_likely[~np.isfinite(logits[greedy, most_likely])] = NO_TOKEN
    tokens[greedy] = most_likely
    filtered = table.filtered[rows] & ~greedy
    for some, pick in ((~greedy & ~filtered, _race), (filtered, _race_above_floors)):
        index = np.flatnonzero(some)
        if len(index):
            keys = position_keys(table.stream[rows[index]], positions[index])
            part = logits if len(index) == len(rows) else logits[index]
            tokens[index] = pick(table, rows[index], part, keys)
    return tokens


def _race(table: SamplingTable, rows: Int64, logits: Float32, keys: Int64) -> Int64:
    native = kernels()
    if native is not None:
        return draw_natively(native, logits, table.temperature[rows], keys)
    tokens = np.full(len(rows), NO_TOKEN, dtype=np.int64)
    blocks, maxima = block_maxima(logits)
    possible = np.flatnonzero(np.isfinite(maxima.max(-1)))
    if len(possible):
        tokens[possible] = draw(blocks[possible], maxima[possible], table.temperature[rows[possible]], keys[possible])[
            0
        ]
    return tokens


def _race_above_floors(table: SamplingTable, rows: Int64, logits: Float32, keys: Int64) -> Int64:
    tokens = np.full(len(rows), NO_TOKEN, dtype=np.int64)
    blocks, maxima = block_maxima(logits)
    possible = np.isfinite(maxima.max(-1))
    if not possible.all():
        rows, logits, blocks, maxima, keys = (part[possible] for part in (rows, logits, blocks, maxima, keys))
    if len(rows):
        temperature = table.temperature[rows]
        floors, cut_off = filter_floors(
            blocks, maxima, temperature, table.top_k[rows], table.top_p[rows], table.min_p[rows]
        )
        for row, ids in cut_off:
            blocks[row].ravel()[ids] = logits[row, ids] = -np.inf
        native = kernels()
        if native is None:
            tokens[possible] = draw(blocks, maxima, temperature, keys, floors)[0]
        else:
            tokens[possible] = draw_natively(native, logits, temperature, keys, floors)
    return tokens
