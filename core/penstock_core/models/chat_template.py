"""Chat templates: a conversation to one prompt text, by the checkpoint's own jinja template, in a sandbox.

The template comes with the checkpoint and the messages from users, so neither is trusted: attributes and mutation are
closed by jinja's immutable sandbox, and the size of what a template builds is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock_core.models.errors import BrokenCheckpoint
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import MAX_PROMPT_CHARS


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: Any) -> Any:
        """The body of the block, unchanged."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's immutable sandbox, with `*` and `**` bounded: `'a' * 10**9` must not take the worker's memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply numbers as they are, sequences up to the bound."""
        numbers = [x for x in (left, right) if isinstance(x, int | float)]
        lengths = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
        too_long = bool(lengths and numbers) and lengths[0] * numbers[0] > MAX_PROMPT_CHARS
        if too_long or (operator == "**" and (abs(numbers[0]) > 1_000_000 or abs(numbers[-1]) > 64)):
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """jinja's own filter escapes HTML characters, which templates do not expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        """Compile it.

        Raises:
            BrokenCheckpoint: the template is not valid jinja.
        """
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], autoescape=False
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.exceptions.TemplateError as error:
            raise BrokenCheckpoint(f"the chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt text of a conversation.

        Raises:
            InvalidRequest: the template refuses these messages, or its output exceeds the prompt limit.
        """
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(messages=plain, **variables):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT_CHARS:
                    raise InvalidRequest(
                        "messages",
                        f"rendered by the chat template they exceed {MAX_PROMPT_CHARS} characters; send less",
                    )
        except jinja2.exceptions.TemplateError as error:
            raise InvalidRequest("messages", f"refused by the model's chat template: {error.message}") from error
        except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest("messages", f"the model's chat template cannot render them: {error}") from error
        return "".join(parts)
