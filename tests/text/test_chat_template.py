"""Chat templates: equality with transformers for the usual styles, and clear refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.text.conftest import save, tiny_backend
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.text import chat_template
from tokenloom.text.chat_template import ChatTemplate, check_messages
from tokenloom.text.tokenizer import Tokenizer

Message = dict[str, Any]

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA2 = """
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""

LLAMA3 = """
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- set header = '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' %}
    {%- set content = header ~ message.content | trim ~ '<|eot_id|>' %}
    {%- if ns.first %}{% set content = bos_token + content %}{% set ns.first = false %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role: "here" <&>') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {%- if loop.last and tools is not none %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {{- call.function | tojson }}{{ ', ' if not loop.last }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- set result = {'content': message.content, 'id': message.tool_call_id} %}
        {{- '[TOOL_RESULTS] ' + result | tojson + '[/TOOL_RESULTS]' }}
    {%- else %}
        {%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""

THINKING = """
{%- for message in messages %}
    {%- if loop.index > 20 %}{% break %}{% endif %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
    {{- message.content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' + ('' if enable_thinking | default(true) else '<think></think>') }}
{%- endif %}
"""

STYLES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "thinking": THINKING,
}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief.\n"}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "find", "arguments": {"q": "naïve <b>&'\"", "n": 3}},
}
CONVERSATIONS: dict[str, list[Message]] = {
    "one": [user("Hello")],
    "system": [SYSTEM, user("  Hi there  ")],
    "turns": [user("1 < 2 & 'x'"), assistant('yes "so"'), user("日本 🎉\n\nnew")],
    "long": [SYSTEM, user("a"), assistant("b "), user("c"), assistant(" d "), user("e")],
    "tool": [
        user("find it"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ],
    "reasoned": [user("why"), assistant("because", reasoning="I thought"), user("and?")],
    "open": [user("Tell me"), assistant("Once upon a ")],
    "open stripped": [user("Tell me"), assistant("Once upon a time")],
    "open empty": [user("Tell me"), assistant("")],
    "open twice": [user("Once"), assistant("Once")],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "description": "Finds <things> & más", "parameters": {}},
    }
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, Any]]:
    """Our tokenizer and transformers', both with the template of a style."""
    transformers = pytest.importorskip("transformers")
    made: dict[str, tuple[Tokenizer, Any]] = {}

    def by_style(style: str) -> tuple[Tokenizer, Any]:
        if style not in made:
            folder = save(
                tiny_backend(),
                tmp_path_factory.mktemp("chat") / style,
                bos_token="<s>",
                eos_token="</s>",
                chat_template=STYLES[style],
            )
            made[style] = Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
        return made[style]

    return by_style


def outcome(render: Callable[[], str]) -> str | None:
    """The rendered text, or None for a refusal."""
    try:
        return render()
    except Exception:
        return None


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_rendering_equals_transformers(
    style: str, name: str, pair: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = pair(style)
    messages = CONVERSATIONS[name]
    variants: list[dict[str, Any]] = [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": TOOLS},
        {"add_generation_prompt": True, "enable_thinking": False, "bos_token": "<other>"},
    ]
    for options in variants:
        mine = outcome(partial(ours.render_chat, messages, **options))
        reference = outcome(partial(theirs.apply_chat_template, messages, tokenize=False, **options))
        assert mine == reference, options


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["open", "open stripped", "open empty", "open twice"])
def test_open_messages_equal_transformers(
    style: str, name: str, pair: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = pair(style)
    messages = CONVERSATIONS[name]
    mine = outcome(lambda: ours.render_chat(messages, continue_final_message=True))
    reference = outcome(
        lambda: theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    )
    assert mine == reference
    assert mine is not None
    assert mine.rstrip().endswith(messages[-1]["content"].rstrip())


def test_every_style_renders_something(pair: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    """The table above would hold for two renderers that refuse everything."""
    for style in STYLES:
        text = pair(style)[0].render_chat(CONVERSATIONS["turns"])
        assert "1 < 2 & 'x'" in text
        assert "日本 🎉" in text


def test_the_time_is_known() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') | int > 2020 }}")
    assert template.render([user("x")]) == "True"


def test_json_as_transformers_writes_it() -> None:
    template = ChatTemplate(
        "{{ v | tojson }}|{{ v | tojson(indent=1, sort_keys=true) }}|{{ v | tojson(true) }}"
    )
    text = template.render([user("x")], variables={"v": {"b": "é<'>", "a": [1]}})
    assert (
        text
        == '{"b": "é<\'>", "a": [1]}|{\n "a": [\n  1\n ],\n "b": "é<\'>"\n}|{"b": "\\u00e9<\'>", "a": [1]}'
    )


# Messages in the forms that clients send.


@pytest.fixture(scope="module")
def echo() -> ChatTemplate:
    """Writes [role:content] for each message."""
    return ChatTemplate("{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}")


def test_text_parts_are_joined_by_newlines(echo: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert echo.render([user(parts)]) == "[user:one\ntwo]"
    assert echo.render([user([])]) == "[user:]"


def test_developer_is_system_where_the_template_does_not_know_it(echo: ChatTemplate) -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert echo.render(messages) == "[system:x]"
    assert ChatTemplate(echo.source + "{# developer #}").render(messages) == "[developer:x]"
    assert messages[0]["role"] == "developer"


def test_arguments_of_tool_calls_are_parsed() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.n }}")
    for arguments in ('{"n": 5}', {"n": 5}):
        call = {"function": {"name": "f", "arguments": arguments}}
        assert template.render([{"role": "assistant", "tool_calls": [call]}]) == "5"
    assert check_messages([assistant(None, tool_calls=[{"function": {"name": "f", "arguments": ""}}])]) == [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    ]


def test_the_callers_messages_stay_as_they_are(echo: ChatTemplate) -> None:
    messages = [user([{"type": "text", "text": "x"}]), assistant("y", reasoning="z", name=None)]
    before = copy.deepcopy(messages)
    echo.render(messages, continue_final_message=True)
    assert messages == before


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hello", "messages"),
        ({"role": "user"}, "messages"),
        (["hello"], "messages[0]"),
        ([user("x"), {"content": "x"}], "messages[1].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([user(None)], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([assistant(None)], "messages[0].content"),
        ([assistant(None, tool_calls=[])], "messages[0].content"),
        ([user(5)], "messages[0].content"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "messages[0].content"),
        ([user(["text"])], "messages[0].content"),
        ([user([{"type": "text", "text": None}])], "messages[0].content"),
        ([assistant("x", tool_calls="f")], "messages[0].tool_calls"),
        ([assistant("x", tool_calls=["f"])], "messages[0].tool_calls[0]"),
        ([assistant("x", tool_calls=[{"function": {}}])], "messages[0].tool_calls[0]"),
        (
            [assistant("x", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [assistant("x", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_wrong_messages_are_named(echo: ChatTemplate, messages: Any, param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        echo.render(messages)
    assert caught.value.param == param


def test_the_part_type_is_in_the_message(echo: ChatTemplate) -> None:
    with pytest.raises(InvalidParameter, match="image_url.*not supported"):
        echo.render([user([{"type": "image_url"}])])


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([assistant("x")], {"add_generation_prompt": True}, "continue_final_message"),
        ([user("x")], {}, "continue_final_message"),
        ([assistant(None, tool_calls=[CALL])], {}, "continue_final_message"),
        ([user("x"), assistant("y")], {"variables": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_open_messages_that_cannot_be(
    echo: ChatTemplate, messages: list[Message], options: Mapping[str, Any], param: str
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        echo.render(messages, continue_final_message=True, **options)
    assert caught.value.param == param


def test_a_template_that_hides_the_final_message() -> None:
    template = ChatTemplate("{{ messages[-1].content[:2] }}")
    with pytest.raises(InvalidParameter) as caught:
        template.render([assistant("hello")], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_a_template_that_shows_the_final_message_twice() -> None:
    """transformers lets its mark slip into the prompt there."""
    template = ChatTemplate("{{ messages[-1].content }}|{{ messages[-1].content }}")
    with pytest.raises(InvalidParameter, match="whole and once"):
        template.render([assistant("hello")], continue_final_message=True)


def test_the_mark_in_an_earlier_message_is_refused(echo: ChatTemplate) -> None:
    with pytest.raises(InvalidParameter, match="whole and once"):
        echo.render([user(chat_template._OPEN_END), assistant("x")], continue_final_message=True)


# What a template must not do.


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[0].content + 3 }}",
        "{{ missing.field.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__()[0]() }}",
        "{{ strftime_now.__globals__.keys() }}",
        "{% include 'file' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10000000) }}",
    ],
)
def test_failures_become_invalid_parameter(source: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        ChatTemplate(source).render([user("x")])
    assert caught.value.param == "messages"
    assert str(caught.value).startswith("messages: the chat template refused them: ")


def test_what_raise_exception_says_reaches_the_client() -> None:
    with pytest.raises(InvalidParameter, match="only 3 turns <please>"):
        ChatTemplate("{{ raise_exception('only 3 turns <please>') }}").render([user("x")])


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    template = ChatTemplate("{% for i in range(100) %}{{ messages[0].content }}{% endfor %}")
    assert len(template.render([user("0123456789")])) == 1000
    with pytest.raises(InvalidParameter, match="more than 1000 characters"):
        template.render([user("0123456789+")])


def test_templates_that_do_not_compile() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% if %}")


def test_template_without_transformers_features(tmp_path: Path) -> None:
    """Special tokens by name are there, and the absent ones are empty."""
    folder = save(
        tiny_backend(), tmp_path / "m", eos_token="</s>", chat_template="[{{ bos_token }}{{ eos_token }}]"
    )
    assert Tokenizer.from_dir(folder).render_chat([user("x")]) == "[</s>]"
