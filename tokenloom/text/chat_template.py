"""Chat messages to prompt text, by the checkpoint's own Jinja template.

The template runs on plain data in a sandbox that bounds its time and its output, and sees the names and filters
that transformers gives to chat templates. Special tokens spelt in a message are text here; the tokenizer reads
them as the tokens, as transformers and vLLM do, so whoever serves strangers strips them before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.utils import Namespace

from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.text.template_sandbox import LimitedSandbox, limited_steps

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_RENDERED_CHARS = 1 << 24

# Put behind the final message to find its end in the rendered text. The space at its end tells whether the
# template keeps the spaces at the end of a message or strips them.
_OPEN_END = "TOKENLOOM_OPEN_MESSAGE_END "
# Names under which clients send an assistant's reasoning; templates read the first, gpt-oss templates the
# second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


class ChatTemplate:
    """One compiled chat template; raises `ModelError` if it is no valid template."""

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            with limited_steps():
                self._template = _ENVIRONMENT.from_string(source)
                self._reads_parts = _reads_parts(_ENVIRONMENT.parse(source))
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ModelError(
                f"a chat template that does not compile ({error})", "a Jinja template"
            ) from error
        # Few templates know the role "developer", the newer name of "system".
        self._knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Prompt text of `messages`, at most `MAX_RENDERED_CHARS` characters.

        A message has a `role` of `ROLES` and a `content`: a string, or a list of {"type": "text", "text":
        ...} parts, which are joined by newlines for templates that do not loop over a message's content. The
        role "developer" is rendered as "system" by templates that do not name it. `add_generation_prompt`
        None means: unless `continue_final_message`; both at once are refused. Raises `InvalidParameter`
        naming the message, or "messages" with what the template said.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidParameter("continue_final_message", True, "false when add_generation_prompt is true")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        variables = variables or {}
        if reserved := sorted(_RESERVED & variables.keys()):
            raise InvalidParameter(
                "chat_template_kwargs", reserved[0], "names that the server does not set itself"
            )
        for name, objects in (("tools", tools), ("documents", documents)):
            _check_objects(name, objects)
        chat = check_messages(messages, keep_parts=self._reads_parts)
        if not self._knows_developer:
            for message in chat:
                if message["role"] == "developer":
                    message["role"] = "system"
        final = _open_final_message(chat) if continue_final_message else None
        if final is not None and "content" not in self.source:
            raise _cannot_continue()
        text = self._run(
            messages=chat,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return text if final is None else _cut_at_open_end(text, final)

    def _run(self, **context: Any) -> str:
        parts: list[str] = []
        num_chars = 0
        try:
            with limited_steps():
                for part in self._template.generate(**context):
                    parts.append(part)
                    num_chars += len(part)
                    if num_chars > MAX_RENDERED_CHARS:
                        break
        except (
            Exception
        ) as error:  # a template is the checkpoint's program: it may raise whatever Python can raise
            raise _refused(context["messages"], f"the chat template refused them: {error}") from error
        if num_chars > MAX_RENDERED_CHARS:
            raise _refused(context["messages"], f"rendered to more than {MAX_RENDERED_CHARS} characters")
        return "".join(parts)


def _refused(chat: Sequence[Any], reason: str) -> InvalidParameter:
    return InvalidParameter("messages", f"{len(chat)} messages", reason, message=f"messages: {reason}")


def _check_objects(name: str, objects: object) -> None:
    if objects is None:
        return
    listed = isinstance(objects, Sequence) and not isinstance(objects, str)
    if not (listed and all(isinstance(entry, Mapping) for entry in cast("Sequence[object]", objects))):
        raise InvalidParameter(name, objects, "a list of objects")


def check_messages(messages: object, keep_parts: bool = False) -> list[dict[str, Any]]:
    """Copies of the messages in the form that templates expect.

    Raises `InvalidParameter` naming the wrong field. Content parts are joined unless `keep_parts`, fields that
    are null are left out, arguments of tool calls are parsed from JSON, and reasoning is given under the names
    that templates read.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidParameter("messages", messages, "a list of at least one message")
    return [_check_message(f"messages[{i}]", message, keep_parts) for i, message in enumerate(messages)]


def _check_message(where: str, message: object, keep_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidParameter(where, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidParameter(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    checked = {key: value for key, value in message.items() if value is not None}
    calls = checked.get("tool_calls")
    if calls is not None:
        checked["tool_calls"] = _check_tool_calls(f"{where}.tool_calls", calls)
    # An assistant message that only calls tools has no content, and templates take its absence better than
    # None.
    if "content" in checked or role != "assistant" or not calls:
        content = message.get("content")
        texts = _texts_of(f"{where}.content", content)
        if not keep_parts or isinstance(content, str):
            checked["content"] = "\n".join(texts)
        else:
            checked["content"] = [{"type": "text", "text": text} for text in texts]
    reasoning = next((checked[name] for name in _REASONING if name in checked), None)
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    return checked


def _texts_of(where: str, content: object) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise InvalidParameter(where, content, "a string or a list of text parts")
    texts: list[str] = []
    for part in content:
        if not isinstance(part, Mapping):
            raise InvalidParameter(where, part, "a string or a list of text parts")
        kind = part.get("type")
        if kind != "text":
            raise InvalidParameter(
                where, kind, 'made of parts of type "text" (other types are not supported)'
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidParameter(where, text, "made of parts whose text is a string")
        texts.append(text)
    return texts


def _check_tool_calls(where: str, calls: object) -> list[dict[str, Any]]:
    """Clients send a call's arguments as JSON text; templates expect the object."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidParameter(where, calls, "a list of tool calls")
    checked: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidParameter(f"{where}[{i}]", call, "an object with a function that has a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                limit = "a JSON object as text"
                raise InvalidParameter(f"{where}[{i}].function.arguments", function["arguments"], limit)
        parsed = {} if arguments is None else {"arguments": arguments}
        checked.append({**call, "function": {**function, **parsed}})
    return checked


def _open_final_message(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the final message; returns its content."""
    final = chat[-1]
    if final["role"] != "assistant":
        raise InvalidParameter(
            "continue_final_message", True, "false unless the last message is the assistant's"
        )
    content = final.get("content")
    if content is None or content == []:
        raise InvalidParameter("continue_final_message", True, "false unless the last message has content")
    if isinstance(content, list):
        last = content[-1]
        text: str = last["text"]
        last["text"] = text + _OPEN_END
    else:
        text = content
        final["content"] = text + _OPEN_END
    return text


def _cut_at_open_end(text: str, final: str) -> str:
    mark = _OPEN_END.rstrip()
    end = text.rfind(mark)
    kept = text[:end]
    # A second mark would be part of the prompt.
    if end < 0 or mark in kept or final.strip() not in text:
        raise _cannot_continue()
    # Without the mark's own space the template strips messages, so the message's end is stripped as well.
    return kept if text.startswith(_OPEN_END, end) else kept.rstrip()


def _cannot_continue() -> InvalidParameter:
    reason = "the chat template does not show the final message whole and once, so it cannot be continued"
    return InvalidParameter(
        "continue_final_message", True, "false", message=f"continue_final_message: {reason}"
    )


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's content, so that it takes a list of parts as it is."""
    names = {"content"}

    def is_content(node: nodes.Node | None) -> bool:
        match node:
            case nodes.Filter():
                return is_content(node.node)
            case nodes.Getattr():
                return node.attr == "content"
            case nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Name():
                return node.name in names
        return False

    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and is_content(assign.node):
            names.add(assign.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is simply rendered.

    The body is a macro's, as in transformers: what it sets is gone behind it.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body, lineno=line)

    @staticmethod
    def _said(caller: Macro) -> str:
        return str(caller())


class _Namespace(Namespace):
    """Jinja's `namespace()` without names of Python's internals, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a name that a template may give
        names = dict(*args[1:], **kwargs)
        for name in names:
            _check_attribute(name)
        Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace takes no name with an underscore in front: {name}"
        )


class _Dictionary:
    """`dict` without the attributes of a class, as in transformers."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which would change the prompt."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> LimitedSandbox:
    environment = LimitedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dictionary()
    environment.globals["namespace"] = _Namespace
    environment.meter()
    return environment


_ENVIRONMENT = _environment()
