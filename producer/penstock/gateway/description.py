"""`/openapi.json`: FastAPI's description of the routes, completed with an example for every request and answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from penstock.gateway import examples


def describe(app: FastAPI) -> dict[str, Any]:
    """The complete description; made once."""
    schema = app.openapi()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            _complete(f"{method.upper()} {path}", operation)
    return schema


def _complete(label: str, operation: dict[str, Any]) -> None:
    openai = "OpenAI" in operation.get("tags", ())
    if label in examples.REQUESTS:
        operation["requestBody"]["content"]["application/json"]["example"] = examples.REQUESTS[label]
    for status, answer in operation["responses"].items():
        contents = answer.setdefault("content", {})
        if int(status) < 300:
            for media_type, content in contents.items():
                texts = examples.TEXT.get(label, {})
                example = texts.get(media_type, examples.JSON.get(label) if media_type == "application/json" else None)
                if example is not None:
                    content["example"] = example
        elif "application/json" in contents and label != "GET /v1/health":
            contents["application/json"]["example"] = examples.error(int(status), openai=openai)
        elif label == "GET /v1/health":
            contents["application/json"]["example"] = {
                **examples.JSON[label],
                "status": "degraded",
                "workers": 0,
                "detail": "no worker serves queue penstock-story: start one with 'penstock worker'",
            }
