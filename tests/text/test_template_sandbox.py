"""No template runs for long or makes large values; none that is usual comes near the limits."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest

from tests.text.test_chat_families import CONVERSATIONS, TEMPLATES, TOOLS, ours_or_refusal
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.text import template_sandbox
from tokenloom.text.chat_template import ChatTemplate
from tokenloom.text.template_sandbox import LimitedSandbox, limited_steps

HELLO = [{"role": "user", "content": "hello " * 100}]
# Each would run for minutes or take gigabytes.
HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "loop over a filter": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "lazy filters": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | select | list %}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for i in [9, 9] recursive %}{{ loop([9, 9]) }}{% endfor %}",
    "repeated text": "{{ 'x' * 10**9 }}",
    "repeated from the left": "{{ (10**9 * 'x') | length }}",
    "repeated list": "{% set x = [0] * 10**9 %}",
    "repeated repetition": "{% set x = ([0] * 99999) * 99999 %}",
    "power": "{{ (10 ** (10 ** 9)) > 1 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubled by ~": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled block": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}"
    ),
    "doubled by a macro": (
        "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set ns.x = d(ns.x) %}{% endfor %}"
    ),
    "doubled by replace": (
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}"
    ),
    "doubled by a filter": (
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}"
    ),
    "empty replace": "{% set x = 'x' * 9999999 %}{{ x.replace('', x) }}",
    "joined": "{% set x = 'x' * 9999999 %}{{ ([x] * 99999) | join }}",
    "joined by a method": "{% set x = 'x' * 9999999 %}{{ ''.join([x] * 99999) }}",
    "joined lazily": "{% set x = 'x' * 9999999 %}{{ ([x] * 99999) | map('string') | join }}",
    "joined by a long text": "{% set x = 'x' * 9999999 %}{{ range(9999) | join(x) }}",
    "joined by the method of a long text": "{% set x = 'x' * 9999999 %}{{ x.join(range(9999) | map('string')) }}",
    "joined attributes": "{{ ([messages[0]] * 99999) | join(attribute='content') | length }}",
    "sum of lists": "{{ ([[0] * 9999] * 9999) | sum(start=[]) | length }}",
    "width by %": "{{ '%9999999999d' % 1 }}",
    "width of a width": "{{ '%*d' % (9999999999, 1) }}",
    "width by the filter": "{{ '%9999999999d' | format(1) }}",
    "width by format": "{{ '{:9999999999}'.format(1) }}",
    "width by a field": "{{ '{:{}}'.format(1, 9999999999) }}",
    "width by a map": "{{ '{:{w}}'.format_map({'w': 9999999999}) }}",
    "width beside a field": "{{ '{:{}9999999999}'.format(1, '') }}",
    "width of a name": "{{ '%(a)9999999999d' % {'a': 1} }}",
    "precision": "{{ '%.999999999f' % 1.5 }}",
    "many long fields": "{% set x = 'x' * 9999999 %}{{ ('{0}' * 9999).format(x) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "zfill": "{{ 'x'.zfill(9999999999) }}",
    "expandtabs": "{{ ('\t' * 9999).expandtabs(999999) }}",
    "expandtabs by name": "{{ ('\t' * 9999).expandtabs(tabsize=999999) }}",
    "translate": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "to_bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "indent": "{{ ('\n' * 99999) | indent(99999) }}",
    "indent by a text": "{{ ('\n' * 99999) | indent('x' * 99999) }}",
    "indent by name": "{{ ('\n' * 99999) | indent(width=99999) }}",
    "json": "{{ [1] | tojson(indent=9999999999) }}",
    "json by place": "{{ [1] | tojson(false, 9999999999) }}",
    "batch": "{{ [1] | batch(9999999999, 0) | list }}",
    "slice": "{{ [1] | slice(9999999999) | list }}",
    "round": "{{ 1 | round(9999999999, 'ceil') }}",
    "round up": "{{ 1.5 | round(16000000, 'ceil') }}",
    "round to tens": "{{ 15 | round(-100000000) }}",
    "round by name": "{{ 15 | round(precision=-100000000) }}",
    "slices": (
        "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{% for j in range(99) %}{% set y = x[1:] %}"
        "{% endfor %}{% endfor %}"
    ),
    "searches": (
        "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{% for j in range(99) %}{{ '' if 'y' in x }}"
        "{% endfor %}{% endfor %}"
    ),
    "split": ("{% set x = 'x ' * 999999 %}{% for i in range(99999) %}{% set y = x.split() %}{% endfor %}"),
    "upper": (
        "{% set x = 'x ' * 999999 %}{% for i in range(99999) %}{% set y = x | upper | trim %}{% endfor %}"
    ),
    "lorem ipsum": "{{ lipsum(n=999999999) | length }}",
    "lorem ipsum of words": "{{ lipsum(n=1, min=999999998, max=999999999) | length }}",
    **{
        f"nested, {use}": (
            "{% set ns = namespace(x=[1], y=[2]) %}{% for i in range(99) %}"
            "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}" + use
        )
        for use in (
            "{{ ns.x }}",
            "{{ ns }}",
            "{{ ns.x ~ 'a' }}",
            "{{ ('' ~ (ns.x or 1)) | length }}",
            "{{ ns.x == ns.y }}",
            "{{ ns.x in [ns.y] }}",
            "{{ [ns.x] | select('eq', ns.y) | list }}",
            "{{ [ns.x, ns.y] | sort | length }}",
            "{{ [ns.x, ns.y].index(ns.y) }}",
            "{{ ns.x | tojson | length }}",
            "{{ ns.x | string | length }}",
            "{{ ns.x | join | length }}",
            "{{ '%s' % (ns.x,) }}",
            "{{ '{}'.format(ns.x) }}",
            "{{ ','.join([ns.x]) }}",
            "{{ ns.x | upper }}",
            "{{ ns.x | pprint }}",
        )
    },
    "constant": "{{ 'x' | center(9999999999) | length }}",
    "output": "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_soon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", template_sandbox.MAX_STEPS // 8)
    start = time.monotonic()
    with pytest.raises((InvalidParameter, ModelError)) as caught:
        ChatTemplate(HOSTILE[name]).render(HELLO)
    if isinstance(caught.value, InvalidParameter):
        assert caught.value.param == "messages"
    assert time.monotonic() - start < 20  # on a busy machine; half a second otherwise


@pytest.mark.parametrize("name", TEMPLATES)
def test_usual_templates_stay_far_from_the_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the steps everything renders that renders at all."""
    template = ChatTemplate(TEMPLATES[name].read_text(encoding="utf-8"))
    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}

    def texts() -> list[str | None]:
        render = partial(template.render, tools=TOOLS, variables=variables)
        return [ours_or_refusal(partial(render, messages)) for messages in CONVERSATIONS.values()]

    expected = texts()
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", template_sandbox.MAX_STEPS // 10)
    assert texts() == expected


def test_long_numbers_in_a_format_are_no_widths() -> None:
    template = ChatTemplate(
        "{{ 'on 20301231 {:>3}%'.format(1733000000) ~ '20301231 %s %d' | format('a', 9876543210) }}"
    )
    assert template.render(HELLO) == "on 20301231 1733000000%20301231 a 9876543210"


def test_the_count_does_not_depend_on_what_ran_before() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{% endfor %}{{ messages[0].content }}")
    for _ in range(60):
        assert template.render([{"role": "user", "content": "x"}]) == "x"


def test_the_exact_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 1000)
    # A call costs 8; then the values of the range, and a step for each turn.
    assert ChatTemplate("{% for i in range(496) %}{% endfor %}").render(HELLO) == ""
    with pytest.raises(InvalidParameter, match="it takes more than 1000 steps"):
        ChatTemplate("{% for i in range(497) %}{% endfor %}").render(HELLO)


def test_threads_have_their_own_steps() -> None:
    template = ChatTemplate("{% for i in range(9999) %}{% for j in range(19) %}{% endfor %}{% endfor %}x")
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(template.render(HELLO))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["x", "x"]


def test_a_template_cannot_name_the_meters() -> None:
    environment = LimitedSandbox()
    environment.meter()
    with limited_steps():
        assert environment.from_string("{{ [1, 2] | join('-') }}").render() == "1-2"
    names = set(environment.filters) - set(LimitedSandbox().filters)
    assert len(names) == 3
    assert all(not name.isidentifier() for name in names)
