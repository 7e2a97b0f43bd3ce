"""Chat templates in the manner of each family, and what clients send, against transformers.

The templates lie in `templates/`, one file per family or group of features.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.conftest import save, tiny_backend, write_json
from tokenloom.errors import InvalidParameter
from tokenloom.text.tokenizer import Tokenizer

Message = dict[str, Any]
Pair = tuple[Tokenizer, Any]
TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
# Those that loop over a message's content get its parts, the others the parts' texts joined by newlines.
READ_PARTS = {"gemma_parts", "parts_macro"}


def user(content: Any, **more: Any) -> Message:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def call(name: str, arguments: Any, call_id: str = "abcdefgh9") -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parts(*texts: str) -> list[Message]:
    return [{"type": "text", "text": text} for text in texts]


def result(content: Any, call_id: str = "abcdefgh9") -> Message:
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": "find"}


ASK = [
    user("Find it"),
    assistant(None, tool_calls=[call("find", {"q": "naïve <b>&'\"\n🎉", "n": [1, None, 2.5]})]),
]
CONVERSATIONS: dict[str, list[Message]] = {
    "one": [user("Hello")],
    "system": [system("Be brief.\n"), user("  Hi there  ")],
    "system alone": [system("Be brief.")],
    "turns": [user("1 < 2 & 'x'"), assistant('yes "so"'), user("and\n\nthen?")],
    "many turns": [system("S"), *(m for i in range(9) for m in (user(f"q{i}"), assistant(f"a{i} ")))],
    "users in a row": [user("a"), user("b"), assistant("c"), user("d"), user("e")],
    "late system": [user("a"), assistant("b"), system("Now in French."), user("c")],
    "assistant first": [assistant("Welcome."), user("Hi")],
    "assistants in a row": [user("a"), assistant("b"), assistant("c"), user("d")],
    "empty content": [system(""), user(""), assistant(""), user(" ")],
    "unicode": [
        user("日本語 🎉👩‍👩‍👧‍👦 e\u0301 العربية \u202eabc\u200b"),
        assistant("ﬁ Å ½ \ufeff"),
        user("नमस्ते"),
    ],
    "control characters": [
        user("a\x00b\x01\x1b[0m\x7f\r\nc\td\x0b\x0c\x85\u2028\u2029"),
        assistant("\x1f"),
        user("\r"),
    ],
    "parts": [
        system(parts("Be", "brief")),
        user(parts("one ", "two")),
        assistant(parts("x")),
        user(parts("")),
    ],
    "tool": [*ASK, result("3 < 4")],
    "tool answered": [system("S"), *ASK, result('{"a": "ü"}'), assistant("Done"), user("Again")],
    "two calls": [
        user("both"),
        assistant("Wait.", tool_calls=[call("a", {}), call("b", {"x": "y"}, "123456789")]),
        result("1"),
        result("2", "123456789"),
    ],
    "short call id": [user("x"), assistant(None, tool_calls=[call("f", {}, "c1")]), result("r", "c1")],
    "calls in turn": [*ASK, result("1"), *ASK[1:], result("2"), assistant("Found."), user("Thanks")],
    "thoughts": [user("why"), assistant("Because.", reasoning_content="I thought\n"), user("and?")],
    "thoughts in the text": [
        user("why"),
        assistant("<think>\nhm\n</think>\n\nBecause."),
        user("so"),
        assistant("<think>"),
    ],
    "special tokens": [
        system("<s></s>"),
        user("<|im_end|>\n<|im_start|>assistant\n</s>[INST]<|eot_id|><end_of_turn>"),
        assistant("<s><|im_start|>"),
        user("{{ 7 * 7 }} {% raw %} {# x #}"),
    ],
    "names": [user("a", name="Ann"), assistant("b", name="Bot"), user("c", name=None)],
    "long": [system("s" * 3000), user("Wörd " * 5000), assistant("line\n" * 5000), user("?")],
    "very many": [m for i in range(100) for m in (user(f"question {i}"), assistant(f"answer {i}"))],
    "open": [user("Tell me"), assistant("Once upon a ")],
    "open stripped": [user("Tell me"), assistant("Once upon a time")],
    "open parts": [user("Tell me"), assistant(parts("Once ", "upon"))],
    "open twice": [user("Once"), assistant("Once"), user("Once"), assistant("Once")],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds <things> & más,\nlines of it",
            "parameters": {
                "type": "object",
                "properties": {
                    "q": {"type": "string", "description": "日本"},
                    "n": {"type": "array", "items": {"type": ["number", "null"]}},
                    "how": {"enum": ["fast", "é"]},
                    "deep": {"type": "object", "properties": {"b": {}, "A": {"type": "boolean"}}},
                },
                "required": ["q"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "description": "", "parameters": {}}},
]
DOCUMENTS = [{"title": "One", "text": "First <&> ünï"}, {"title": "Two", "text": ""}]
OPTIONS: dict[str, dict[str, Any]] = {
    "prompt": {"add_generation_prompt": True},
    "no prompt": {"add_generation_prompt": False},
    "tools": {"add_generation_prompt": True, "tools": TOOLS},
    "no tools": {"add_generation_prompt": True, "tools": []},
    "documents": {"add_generation_prompt": True, "documents": DOCUMENTS},
    "both": {"add_generation_prompt": False, "tools": TOOLS[:1], "documents": DOCUMENTS},
    "variables": {
        "add_generation_prompt": True,
        "enable_thinking": False,
        "controls": {"citations": 3},
        "bos_token": "<other>",
        "tools_in_user_message": False,
        "date_string": "1 May 2030",
    },
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Our tokenizer and transformers', both with the same template."""
    transformers = pytest.importorskip("transformers")
    made: dict[str, Pair] = {}

    def by_name(name: str) -> Pair:
        if name not in made:
            folder = save(
                tiny_backend(),
                tmp_path_factory.mktemp("chat") / name,
                bos_token="<s>",
                eos_token="</s>",
                chat_template=TEMPLATES[name].read_text(encoding="utf-8"),
            )
            made[name] = Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
        return made[name]

    return by_name


def ours_or_refusal(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except InvalidParameter:
        return None


def theirs_or_refusal(render: Callable[[], Any]) -> Any:
    try:
        return render()
    except Exception:
        return None


def for_transformers(name: str, messages: list[Message]) -> list[Message]:
    if name in READ_PARTS:
        return messages
    messages = copy.deepcopy(messages)
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = "\n".join(part["text"] for part in message["content"])
    return messages


def check_equal(name: str, pair: Pair, messages: list[Message], options: dict[str, Any]) -> str | None:
    """Same text or both refused, and the same token ids; returns the text."""
    ours, theirs = pair
    text = ours_or_refusal(partial(ours.render_chat, messages, **options))
    sent = for_transformers(name, messages)
    assert text == theirs_or_refusal(partial(theirs.apply_chat_template, sent, tokenize=False, **options)), (
        options
    )
    if text is not None:
        expected = theirs.apply_chat_template(sent, tokenize=True, return_dict=False, **options)
        assert ours.encode(text, add_special_tokens=False) == expected
    return text


def test_the_table_is_as_large_as_it_should_be() -> None:
    assert len(TEMPLATES) >= 16
    assert len(CONVERSATIONS) >= 25


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(name: str, conversation: str, pair: Callable[[str], Pair]) -> None:
    for options in OPTIONS.values():
        check_equal(name, pair(name), CONVERSATIONS[conversation], options)


@pytest.mark.parametrize(
    "conversation", [name for name, ms in CONVERSATIONS.items() if ms[-1]["role"] == "assistant"]
)
@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if name != "loops"]
)  # shows pieces of a message several times
def test_open_messages_equal_transformers(name: str, conversation: str, pair: Callable[[str], Pair]) -> None:
    check_equal(name, pair(name), CONVERSATIONS[conversation], {"continue_final_message": True})


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_and_most_of_the_table(name: str, pair: Callable[[str], Pair]) -> None:
    """The table would hold for two renderers that refuse everything."""
    texts = [ours_or_refusal(partial(pair(name)[0].render_chat, ms)) for ms in CONVERSATIONS.values()]
    rendered = [text for text in texts if text is not None]
    assert len(rendered) >= (6 if name == "strict" else 10)
    # Only names of roles and lengths make two conversations the same text.
    assert len(set(rendered)) > len(rendered) // 2


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["</think>", "<think>\nx\n</think>\ny", "<|im_end|>", " ", "\n", "<tool_response></tool_response>"]
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": _TEXT},
    optional={"reasoning_content": _TEXT, "name": _TEXT},
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25)
@given(messages=st.lists(_MESSAGE, min_size=1, max_size=6), option=st.sampled_from(list(OPTIONS)))
def test_any_conversation_equals_transformers(
    name: str, pair: Callable[[str], Pair], messages: list[Message], option: str
) -> None:
    check_equal(name, pair(name), messages, OPTIONS[option])


def test_special_tokens_in_a_message_become_the_tokens(pair: Callable[[str], Pair]) -> None:
    """As transformers and vLLM do; the text of a message can end its turn."""
    ours = pair("phi3")[0]
    ids = ours.encode(ours.render_chat([user("a</s>b")]), add_special_tokens=False)
    assert ours.eos_token_id in ids


# Where templates come from.

DEFAULT, OTHER, TOOL_USE = "default {{ messages[0].content }}", "other", "tools {{ tools | length }}"
SOURCES: dict[str, dict[str, Any]] = {
    "string": {"config": DEFAULT},
    "list": {
        "config": [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": TOOL_USE}]
    },
    "list without default": {"config": [{"name": "tool_use", "template": TOOL_USE}]},
    "list without both": {"config": [{"name": "rag", "template": OTHER}]},
    "file": {"file": DEFAULT},
    "file over string": {"config": OTHER, "file": DEFAULT},
    "file over list": {"config": [{"name": "tool_use", "template": TOOL_USE}], "file": DEFAULT},
    "file and folder": {"file": DEFAULT, "folder": {"tool_use": TOOL_USE, "rag": OTHER}},
    "folder alone": {"folder": {"tool_use": TOOL_USE}},
    "folder over string": {"config": DEFAULT, "folder": {"tool_use": TOOL_USE}},
    "default in the folder": {"file": OTHER, "folder": {"default": DEFAULT}},
    "empty": {"config": ""},
    "nothing": {},
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_of_templates_equal_transformers(source: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    given_as = SOURCES[source]
    more = {"chat_template": given_as["config"]} if "config" in given_as else {}
    folder = save(tiny_backend(), tmp_path / "model", bos_token="<s>", eos_token="</s>", **more)
    if "file" in given_as:
        (folder / "chat_template.jinja").write_text(given_as["file"])
    for name, text in given_as.get("folder", {}).items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    pair = Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    variants: list[dict[str, Any]] = [{}, {"tools": TOOLS}, {"tools": []}]
    found = [check_equal("", pair, [user("hi")], options) for options in variants]
    if source.startswith("file"):
        assert found[0] == "default hi"
    if source in ("nothing", "list without both"):
        assert found == [None, None, None]


def test_a_template_file_keeps_its_bytes(tmp_path: Path) -> None:
    """Line ends and a byte-order mark, read as transformers reads them."""
    transformers = pytest.importorskip("transformers")
    folder = save(tiny_backend(), tmp_path / "model", bos_token="<s>")
    for number, data in enumerate(
        (b"a\r\nb\rc\n\n", b"\xef\xbb\xbf{{ bos_token }}\n", b"x{{ '\r\n' }}\ty \n")
    ):
        (folder / "chat_template.jinja").write_bytes(data)
        pair = Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
        assert check_equal("", pair, [user("hi")], {}) is not None, number


def test_real_templates_equal_transformers(shared_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = 0
    for path in sorted(shared_data.rglob("tokenizer_config.json")):
        template = json.loads(path.read_text()).get("chat_template")
        if not template:
            continue
        folder = save(tiny_backend(), tmp_path / str(found), bos_token="<s>", eos_token="</s>")
        write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "chat_template": template})
        pair = Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
        for messages in CONVERSATIONS.values():
            for options in OPTIONS.values():
                check_equal("", pair, messages, options)
        found += 1
    if not found:
        pytest.skip("no chat templates in the test data")


# What transformers refuses and Jinja alone would not.


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(_x=1) %}{{ ns._x }}",
        "{% set ns = namespace(a=1) %}{% set ns._b = 2 %}",
        "{{ namespace({'__class__': 1}) }}",
        "{{ dict.mro() }}",
        "{% set ns = namespace(self=5) %}{{ ns.self }}",
        "{{ dict(a=1).a ~ dict([('b', 2)]).b ~ dict.fromkeys([1, 2], 'x') }}",
        "{% generation %}{% set x = 1 %}{% endgeneration %}[{{ x }}]",
        "{% set x = 1 %}{% generation %}{{ x }}{% endgeneration %}",
        "{{ messages[0] is mapping }}{{ messages is sequence }}{{ none is none }}{{ x is undefined }}",
        "{{ messages[0].get('content', 'y') ~ messages[0].nothing | default('z') }}",
        "{{ messages[0].items() | list }}{{ messages[0].keys() | list }}",
        "{{ messages.pop() }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ 'a' is filter }}{{ 'upper' is filter }}{{ 'odd' is test }}",
        "{{ [3, 1, 2] | sort(reverse=true) | join }}{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}",
        "{{ [[1], [2, 3]] | sum(start=[]) }}{{ messages | sum(attribute='n') }}",
        "{{ 'x' | center(9) ~ 'a\nb' | indent(3, true) ~ 'word word' | wordwrap(4) ~ 2.567 | round(1) }}",
        "{{ lipsum | string | length > 0 }}{{ cycler('a', 'b').next() }}{% set j = joiner('-') %}{{ j() ~ j() }}",
        "{{ '<b>' | escape }}{{ '<b>' | safe }}{{ '%s' % '<' | escape }}",
        "{{ undefined_function() }}",
        "{{ strftime_now('%Y-%m-%d') }}",
        "{% macro m(a, b='x') %}{{ a ~ b ~ varargs | length ~ kwargs }}{% endmacro %}{{ m(1) ~ m(1, 2, 3, c=4) }}",
    ],
)
def test_odd_templates_equal_transformers(source: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save(tiny_backend(), tmp_path / "model", bos_token="<s>", chat_template=source)
    pair = Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    check_equal("", pair, [user("hi", n=2)], {})
