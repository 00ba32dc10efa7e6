"""`/openapi.json` leaves nothing open: every operation has a summary, a typed answer and examples that fit it."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from penstock.gateway.app import create_app
from penstock.gateway.settings import GatewaySettings

SCHEMA = create_app(GatewaySettings()).openapi()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, methods in SCHEMA["paths"].items()
    for method, operation in methods.items()
}


def fits(example: Any, schema: dict[str, Any]) -> None:
    """Also where the schema says no more than 'an object', this is a test that it says more."""
    assert schema, "a schema that admits anything"
    assert schema != {"type": "object", "additionalProperties": True}
    jsonschema.Draft202012Validator({**schema, "components": SCHEMA["components"]}).validate(example)


@pytest.mark.parametrize("label", OPERATIONS)
def test_operation_has_summary_description_typed_answers_and_examples(label: str) -> None:
    operation = OPERATIONS[label]
    assert operation["summary"]
    assert operation["description"]
    assert any(200 <= int(status) < 300 for status in operation["responses"])
    for status, answer in operation["responses"].items():
        assert answer["description"], status
        assert answer["content"], status
        for content in answer["content"].values():
            fits(content["example"], content["schema"])


@pytest.mark.parametrize("label", [label for label in OPERATIONS if "requestBody" in OPERATIONS[label]])
def test_request_has_an_example(label: str) -> None:
    for media_type, content in OPERATIONS[label]["requestBody"]["content"].items():
        if media_type == "multipart/form-data":
            continue  # a form: its fields say what they are
        schema = content["schema"]
        named = SCHEMA["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        for example in [content["example"]] if "example" in content else named["examples"]:
            fits(example, schema)


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_operation_but_health_names_its_key_and_its_errors(label: str) -> None:
    operation = OPERATIONS[label]
    if label == "GET /v1/health":
        return
    assert operation["security"]
    assert {"401", "429", "503"} <= set(operation["responses"])


def test_no_example_is_left_of_a_route_that_is_gone() -> None:
    from penstock.gateway import examples

    assert {*examples.JSON, *examples.TEXT, *examples.REQUESTS} <= set(OPERATIONS)
