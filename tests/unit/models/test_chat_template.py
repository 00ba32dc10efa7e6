"""A chat template can neither reach out of its sandbox nor take more than its bound."""

from __future__ import annotations

import pytest

from penstock_core.models.chat_template import ChatTemplate
from penstock_core.models.errors import BrokenCheckpoint
from penstock_core.protocol.errors import InvalidRequest

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 9 ** 9999999 }}",
        "{% for i in range(9999999) %}x{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ 'x' + 1 }}",
    ],
)
def test_a_hostile_or_broken_template_ends_as_a_refused_request(source: str) -> None:
    with pytest.raises(InvalidRequest, match="messages: "):
        ChatTemplate(source).render(MESSAGES)


def test_a_template_that_does_not_compile_is_the_checkpoints_fault() -> None:
    with pytest.raises(BrokenCheckpoint, match="does not compile"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ '-' * 3 }}{{ 2 ** 8 }}{{ '{a}' | tojson }}", '---256"{a}"'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
    ],
)
def test_what_real_templates_use_works(source: str, expected: str) -> None:
    assert ChatTemplate(source).render(MESSAGES) == expected
