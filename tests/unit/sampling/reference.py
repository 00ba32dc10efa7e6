"""What sampling means, written slowly: one row at a time, sorted, in float64. The sampler is held to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from penstock_core.protocol.requests import SamplingParams


def distribution(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Token -> probability after temperature, top-k, top-p and min-p, by a full sort."""
    order = sorted((i for i, x in enumerate(logits) if x > -math.inf), key=lambda i: (-logits[i], i))
    peak = logits[order[0]]
    weight = {i: math.exp((logits[i] - peak) / params.temperature) for i in order}
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        goal, mass, kept = params.top_p * math.fsum(weight[i] for i in order), 0.0, []
        for i in order:
            if mass >= goal:
                break
            kept.append(i)
            mass += weight[i]
        order = kept
    order = [i for i in order if weight[i] >= params.min_p]
    total = math.fsum(weight[i] for i in order)
    return {i: weight[i] / total for i in order}


def chi_squared_p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Probability of a fit at least this bad by chance; rare outcomes are pooled to five expected draws or more."""
    order = np.argsort(probabilities)
    counts, expected = counts[order].astype(float), probabilities[order] * counts.sum()
    pooled_counts, pooled_expected, c, e = [], [], 0.0, 0.0
    for count, expectation in zip(counts, expected, strict=True):
        c, e = c + count, e + expectation
        if e >= 5.0:
            pooled_counts.append(c)
            pooled_expected.append(e)
            c = e = 0.0
    if pooled_counts:
        pooled_counts[-1] += c
        pooled_expected[-1] += e
    statistic = sum((c - e) ** 2 / e for c, e in zip(pooled_counts, pooled_expected, strict=True))
    degrees = max(1, len(pooled_counts) - 1)
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(statistic / 2.0)))
