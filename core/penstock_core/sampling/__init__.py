"""From logits to tokens and text: stateless sampling, penalties, log-probabilities, stop conditions, grammars."""

from penstock_core.protocol.requests import ResponseFormat, SamplingParams
from penstock_core.sampling.grammar import GrammarCompiler, check_response_format
from penstock_core.sampling.logprobs import prompt_logprobs
from penstock_core.sampling.sampler import NO_TOKEN, SampledTokens, Sampler
from penstock_core.sampling.table import NO_DRAFT, SamplingTable
from penstock_core.sampling.text import Detokenizer, TextStream

__all__ = [
    "NO_DRAFT",
    "NO_TOKEN",
    "Detokenizer",
    "GrammarCompiler",
    "ResponseFormat",
    "SampledTokens",
    "Sampler",
    "SamplingParams",
    "SamplingTable",
    "TextStream",
    "check_response_format",
    "prompt_logprobs",
]
