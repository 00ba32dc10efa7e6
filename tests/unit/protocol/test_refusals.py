"""A refusal names the value (or its size), the limit and the remedy, whatever kind of check refused it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from penstock.gateway.openai.requests import ChatBody
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.refusals import first_problem, place_of, refusal
from penstock_core.protocol.requests import GenerationRequest, JobOptions, SamplingParams


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        (JobOptions, {"priority": 12}, "priority: 12 is above 9; give at most 9"),
        (JobOptions, {"priority": -1}, "priority: -1 is below 0; give at least 0"),
        (SamplingParams, {"top_p": 0}, "top_p: 0 is not above 0.0; give more"),
        (SamplingParams, {"top_k": 2**31}, "top_k: 2147483648 is not below 2147483648; give less"),
        (SamplingParams, {"stop": ["x"] * 20}, "stop: 20 items, at most 16 are allowed; give fewer"),
        (SamplingParams, {"stop": [""]}, "stop.0: is empty; give at least 1 character"),
        (SamplingParams, {"allowed_token_ids": []}, "allowed_token_ids: is empty; give at least 1 item"),
        (SamplingParams, {"colour": "red"}, "colour: unknown option; remove it or check its spelling"),
        (SamplingParams, {"min_tokens": 300}, "request: min_tokens (300) is above max_tokens (256); lower one"),
        (GenerationRequest, {"prompt": ""}, "prompt: is empty; give at least 1 character"),
        (
            GenerationRequest,
            {"prompt": "a" * 4_194_305},
            "prompt: 4194305 characters, at most 4194304 are allowed; shorten it",
        ),
        (GenerationRequest, {"prompt": "\ud800"}, "prompt: is no valid Unicode text; encode it as UTF-8"),
        (GenerationRequest, {"messages": [{"role": "user"}]}, "messages.0.content: is missing; give it (and 1 more)"),
        (JobOptions, {"priority": 12, "max_retries": -1}, "priority: 12 is above 9; give at most 9 (and 1 more)"),
    ],
)
def test_a_refusal_names_value_limit_and_remedy(model: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        model.parse(fields)
    assert str(refused.value) == said


def test_of_what_may_be_several_things_the_nearest_is_explained() -> None:
    """The story: a message with an image was refused with 'content.constrained-str: Input should be a valid string'."""
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(ValidationError) as refused:
        ChatBody.model_validate({"model": "m", "messages": [message]})
    problem = first_problem(refused.value.errors())
    assert place_of(problem["loc"]) == "messages.0.content.0.type"
    assert refusal(problem) == "Input should be 'text', got 'image_url'"
