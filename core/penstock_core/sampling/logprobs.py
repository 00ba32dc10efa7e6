"""Log-probabilities of chosen tokens and of the most likely ones, from the model's raw logits.

"Raw" is before penalties, bias, masks, temperature and filters: what the model believes, not what the options made of
it. Called by the sampler for the rows that ask, and by the pipeline for prompt log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from penstock_core.protocol.jobs import TokenLogprob
from penstock_core.sampling.filters import leading_tokens, probability_mass
from penstock_core.sampling.noise import Float64, Int64
from penstock_core.sampling.race import Float32, block_maxima


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of some rows of a step: chosen tokens' log-probabilities [m] and alternatives, in falling order.

    Attributes:
        place: index into this table by index into the step's rows, -1 for rows that did not ask, [R].
        top: how many alternatives each row asked for, [m].
    """

    place: Int64
    chosen: Float64
    top: Int64
    top_ids: Int64
    top_values: Float64

    def at(self, index: int) -> TokenLogprob | None:
        """The record of step row `index`, or None if it did not ask."""
        place = self.place[index]
        if place < 0:
            return None
        ids = self.top_ids[place, : self.top[place]].tolist()
        return TokenLogprob(
            float(self.chosen[place]), tuple(zip(ids, self.top_values[place, : len(ids)].tolist(), strict=True))
        )


def raw_logprobs(raw: Float32, tokens: Int64, top: Int64, place: Int64) -> Logprobs:
    """Log-probabilities in raw logits [m, vocab] of `tokens` [m], and of the `top` [m] most likely ones."""
    blocks, maxima = block_maxima(raw)
    peak = maxima.max(-1)
    normaliser = peak + np.log([probability_mass(row, top, 1.0) for row, top in zip(blocks, peak, strict=True)])
    ids, values = leading_tokens(blocks, maxima, np.maximum(top, 1))
    widest = int(top.max(initial=0))
    return Logprobs(
        place=place,
        chosen=raw[np.arange(len(raw)), tokens] - normaliser,
        top=np.minimum(top, (values > -np.inf).sum(-1)),
        top_ids=ids[:, :widest],
        top_values=values[:, :widest] - normaliser[:, None],
    )


def prompt_logprobs(logits: torch.Tensor, token_ids: Int64, top: int) -> list[TokenLogprob | None]:
    """Records of prompt tokens [t] under the logits [t, vocab] computed from the token before each."""
    raw: Float32 = logits.detach().to("cpu", torch.float32).contiguous().numpy()
    records = raw_logprobs(raw, token_ids, np.full(len(raw), top, dtype=np.int64), np.arange(len(raw)))
    return [records.at(index) for index in range(len(raw))]
