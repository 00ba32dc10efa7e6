"""From logits to tokens and text: stateless sampling, penalties, log-probabilities, stop conditions, grammars."""

from penstock_core.protocol.requests import ResponseFormat, SamplingParams
from penstock_core.sampling.grammar import GrammarCompiler, check_response_format
from penstock_core.sampling.logprobs import prompt_logprobs
from penstock_core.sampling.sampler import NO_TOKEN, SampledTokens, Sampler
from penstock_core.sampling.table import NO_DRAFT, SamplingTable

__all__ = [
    "NO_DRAFT",
    "NO_TOKEN",
    "GrammarCompiler",
    "ResponseFormat",
    "SampledTokens",
    "Sampler",
    "SamplingParams",
    "SamplingTable",
    "check_response_format",
    "prompt_logprobs",
]
