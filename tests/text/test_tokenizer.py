"""Tokenizer: equality with transformers, and clear errors for directories that are not right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from tests.text.conftest import SHARED, save, tiny_backend, write_json
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.text.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces\tand a tab\r\n\r\nlines\n",
    "naïve café — “quotes” … ½",
    "日本語のテキスト、中文，한국어",
    "emoji 🎉👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇩🇪",
    "العربية עברית हिन्दी ไทย",
    "def f(x):\n    return x ** 2  # comment\n",
    "<s>special</s> tokens <unk> in text <|endoftext|> </s",
    "\u2581 the space mark and \ufffd and \x00\x01\x7f control",
    "1234567890 3.14159 1e-10",
    "a" * 300,
    "e\u0301 combining and \u00e9 composed",
]
Load = Callable[[str], Tokenizer]


@pytest.fixture(scope="module")
def reference(tokenizer_dirs: dict[str, Path]) -> Callable[[str], Any]:
    """transformers' tokenizer of the same directory."""
    transformers = pytest.importorskip("transformers")
    loaded: dict[str, Any] = {}

    def by_name(name: str) -> Any:
        if name not in loaded:
            loaded[name] = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dirs[name]))
        return loaded[name]

    return by_name


@pytest.mark.parametrize("name", SHARED)
def test_encode_and_decode_equal_transformers(name: str, load: Load, reference: Callable[[str], Any]) -> None:
    ours, theirs = load(name), reference(name)
    for special in (True, False):
        expected = [theirs.encode(text, add_special_tokens=special) for text in TEXTS]
        assert [ours.encode(text, special) for text in TEXTS] == expected
        assert ours.encode_batch(TEXTS, special) == expected
        for ids in expected:
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", SHARED)
def test_identity_equals_transformers(name: str, load: Load, reference: Callable[[str], Any]) -> None:
    ours, theirs = load(name), reference(name)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_ids == set(theirs.all_special_ids)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.chat_template is None


@pytest.mark.parametrize("name", ["gpt2", "stories3M"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_encode_equals_transformers_on_any_text(
    name: str, load: Load, reference: Callable[[str], Any], text: str
) -> None:
    assert load(name).encode(text) == reference(name).encode(text)


@given(data=st.data())
def test_decode_equals_transformers_on_any_ids(
    load: Load, reference: Callable[[str], Any], data: st.DataObject
) -> None:
    ids = data.draw(
        st.lists(st.integers(0, 50256), max_size=20) | st.lists(st.integers(94, 255), max_size=20)
    )
    for skip in (True, False):
        assert load("gpt2").decode(ids, skip) == reference("gpt2").decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", SHARED)
def test_every_piece_is_what_the_library_decodes(
    name: str, load: Load, tokenizer_dirs: dict[str, Path]
) -> None:
    """Each token between two others, against the `tokenizers` library itself."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_dirs[name] / "tokenizer.json"))
    ours = load(name)
    assert ours.pieces is not None
    frame = ours.encode("a", add_special_tokens=False)
    before, after = len(ours.decode(frame)), len(ours.decode(frame).lstrip())
    for token in range(ours.vocab_size):
        text = backend.decode([*frame, token, *frame], skip_special_tokens=False)
        inner = text[before : len(text) - after - (len(ours.token_text(frame[0])) - after)]
        assert ours.token_text(token) == inner, token


def test_token_bytes_join_to_the_text(load: Load) -> None:
    for name in SHARED:
        ours = load(name)
        for text in TEXTS:
            ids = ours.encode(text, add_special_tokens=False)
            joined = b"".join(map(ours.token_bytes, ids)).decode()
            # SentencePiece models put a space in front of a text, which their decoder drops.
            assert joined in (ours.decode(ids, False), " " + ours.decode(ids, False)), name


def test_token_bytes_of_byte_tokens(load: Load) -> None:
    llama, gpt2 = load("llama2"), load("gpt2")
    byte = llama.token_id("<0xE6>")
    assert byte is not None
    assert llama.token_bytes(byte) == b"\xe6"
    assert llama.token_text(byte) == "\ufffd"
    assert llama.token_bytes(llama.encode("Hello", add_special_tokens=False)[0]) == b" Hello"
    assert b"".join(map(gpt2.token_bytes, gpt2.encode("🎉"))) == "🎉".encode()
    assert llama.token_bytes(llama.bos_token_id or 0) == b"<s>"


def test_wrong_bytes_leave_their_neighbours_alone_as_in_sentencepiece(load: Load, shared_data: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(
        model_file=str(shared_data / "tokenizers" / "llama2" / "tokenizer.model")
    )
    ours = load("llama2")
    first = ours.token_id("<0x00>") or 0
    word = ours.encode("Hello", add_special_tokens=False)
    for data in (
        b"\xe6\x97\xa5\xff",
        b"\xff\xe6\x97\xa5",
        b"\xe6\x97",
        b"\xf0\x9f\x98",
        b"\xed\xa0\x80",
        b"A\xe6A",
    ):
        ids = [*word, *(first + byte for byte in data), *word]
        assert ours.decode(ids) == theirs.decode(ids)


def test_unknown_ids_add_nothing(tiny: Tokenizer) -> None:
    ids = tiny.encode("hello")
    assert tiny.decode([-1, *ids, 10**9]) == "hello"
    assert tiny.token_text(10**9) == ""
    assert tiny.token_bytes(-5) == b""
    assert 10**9 not in (tiny.pieces or {})


def test_half_a_surrogate_pair_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(InvalidParameter) as caught:
        tiny.encode(json.loads('"half \\ud83d"'))
    assert caught.value.param == "prompt"


def test_the_library_starts_no_threads() -> None:
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


# What the files of a directory may say.


def test_special_tokens_of_the_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    declared = {
        "262": {"content": "<s>", "special": True, "normalized": False},
        "263": {"content": "</s>", "special": True, "normalized": False},
        "264": {"content": "<tool>", "special": False, "normalized": False, "lstrip": True},
        "265": {"content": "<pad>", "special": True, "normalized": False},
    }
    folder = save(
        tiny_backend(),
        tmp_path / "model",
        bos_token={"__type": "AddedToken", "content": "<s>"},
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=None,
        extra_special_tokens=["<tool>"],
        added_tokens_decoder=declared,
        truncation_side="left",
    )
    write_json(folder / "special_tokens_map.json", {"eos_token": "<s>"})
    ours = Tokenizer.from_dir(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    text = "hello <tool> <pad></s>the<s>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id, ours.special_token_id("pad_token")) == (262, 263, 265)
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == 266


def test_special_tokens_map_of_old_directories(tmp_path: Path) -> None:
    folder = save(tiny_backend(), tmp_path / "model", eos_token="<s>")
    write_json(
        folder / "special_tokens_map.json",
        {"eos_token": {"content": "</s>"}, "additional_special_tokens": ["hello"]},
    )
    ours = Tokenizer.from_dir(folder)
    assert ours.eos_token_id == ours.token_id("</s>")
    assert ours.bos_token_id is None
    assert ours.decode(ours.encode("hello the")) == " the"


def test_a_named_token_outside_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    ours = Tokenizer.from_dir(save(tiny_backend(), tmp_path / "model", pad_token="[PAD]", eos_token="</s>"))
    assert ours.special_token_id("pad_token") is None
    assert max(ours.encode("[PAD]")) < ours.vocab_size == 264


@pytest.mark.parametrize(
    "flags", [{"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}, {}]
)
@pytest.mark.parametrize("has_processor", [True, False])
def test_the_post_processor_decides_on_bos(
    tmp_path: Path, flags: dict[str, bool], has_processor: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    backend = tiny_backend()
    if has_processor:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 262)]
        )
    folder = save(backend, tmp_path / "model", bos_token="<s>", eos_token="</s>", **flags)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert Tokenizer.from_dir(folder).encode("hello") == theirs.encode("hello")


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = tiny_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=10)
    assert len(Tokenizer.from_dir(save(backend, tmp_path / "model")).encode("hello the the")) == 5


def test_chat_template_files_win_over_the_configuration(tmp_path: Path) -> None:
    folder = save(tiny_backend(), tmp_path / "model", chat_template="inline")
    assert Tokenizer.from_dir(folder).chat_template == "inline"
    write_json(folder / "chat_template.json", {"chat_template": "legacy"})
    assert Tokenizer.from_dir(folder).chat_template == "inline"
    (folder / "chat_template.jinja").write_text("{# file #}日", encoding="utf-8")
    ours = Tokenizer.from_dir(folder)
    assert ours.chat_template == "{# file #}日"
    assert ours.render_chat([{"role": "user", "content": "x"}]) == "日"


def test_chat_template_json_alone(tmp_path: Path) -> None:
    folder = save(tiny_backend(), tmp_path / "model")
    write_json(folder / "chat_template.json", {"chat_template": "legacy"})
    assert Tokenizer.from_dir(folder).chat_template == "legacy"


def test_named_chat_templates(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools[0].name }}"},
    ]
    folder = save(tiny_backend(), tmp_path / "model", chat_template=named)
    ours = Tokenizer.from_dir(folder)
    messages = [{"role": "user", "content": "x"}]
    assert ours.render_chat(messages) == "plain"
    assert ours.render_chat(messages, tools=[{"name": "search"}]) == "with search"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("from a file")
    ours = Tokenizer.from_dir(folder)
    assert ours.render_chat(messages, tools=[]) == "from a file"
    with pytest.raises(InvalidParameter, match=r"\(tool_use\) have none named default"):
        ours.render_chat(messages)


def test_no_chat_template(tiny: Tokenizer) -> None:
    with pytest.raises(InvalidParameter) as caught:
        tiny.render_chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"
    assert str(caught.value) == "this model has no chat template; use /v1/completions"


def break_file(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b"{", "tokenizer.json that cannot be read"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "tokenizer.json that cannot be read"),
        ("tokenizer.json", b"\xff\xfe\x00", "tokenizer.json that cannot be read"),
        ("tokenizer_config.json", b"[]", "a JSON list"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "not JSON"),
        ("tokenizer_config.json", b"\xff", "cannot be read"),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}', "not JSON"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token 3"),
        ("tokenizer_config.json", b'{"bos_token": {"text": "x"}}', "bos_token"),
        ("tokenizer_config.json", b'{"bos_token": "%s"}' % (b"x" * 5000), "bos_token of 5000 characters"),
        ("tokenizer_config.json", b'{"add_bos_token": "yes"}', "add_bos_token 'yes'"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "y"}}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"007": {"content": "<new>"}}}', "id 7 in"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"900": {"content": "<new>"}}}',
            "'<new>' with id 264",
        ),
        ("tokenizer_config.json", b'{"extra_special_tokens": 5}', "extra_special_tokens"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": 1}]}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": []}]}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": "{% for %}"}', "does not compile"),
        ("special_tokens_map.json", b"3", "a JSON int"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
        ("chat_template.jinja", b"{{ 'open", "does not compile"),
        ("chat_template.json", b'{"chat_template": {"default": 3}}', "chat_template"),
    ],
)
def test_malformed_directories(
    tiny_dir: Path, tmp_path: Path, name: str, content: bytes | None, found: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    break_file(folder, name, content)
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_dir(folder)
    assert found in str(caught.value)


NO_UNITS = {"type": "Precompiled", "precompiled_charsmap": "AAAAAGFiYw=="}
LONE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}], "pair": []}
PANICS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a character map without units": lambda file: file.update(normalizer=NO_UNITS),
    "a template of tokens that are not there": lambda file: file.update(
        post_processor={**LONE, "special_tokens": {}}
    ),
    "a prefix longer than the parts of merges": lambda file: file["model"].update(
        continuing_subword_prefix="x" * 40
    ),
}


@pytest.mark.parametrize("name", PANICS)
def test_files_at_which_the_library_panics(tiny_dir: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    PANICS[name](file)
    write_json(folder / "tokenizer.json", file)
    with pytest.raises(ModelError, match="fails inside its library"):
        Tokenizer.from_dir(folder)


def test_a_panic_at_a_text(tiny_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(tiny_dir)
    tokenizer._backend.normalizer = tokenizers.normalizers.Precompiled(b"\0\0\0\0abc")
    with pytest.raises(ModelError, match="fails inside its library"):
        tokenizer.encode("a")


def test_a_text_that_the_tokenizer_has_no_tokens_for(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_dir(tmp_path)
    assert loaded.encode("known") == [0]
    with pytest.raises(InvalidParameter, match=r"prompt.*text that the tokenizer has tokens for \(.*UNK"):
        loaded.encode("unknown")


@pytest.mark.parametrize(
    ("steps", "decodes"),
    [
        ([("a", "b" * 300)], False),
        ([("a", "b" * 300)], True),
        ([("a", "bb"), ("b", "cc"), ("c", "dd")] * 3, False),
    ],
)
def test_replacements_that_would_blow_a_text_up(
    tmp_path: Path, steps: list[tuple[str, str]], decodes: bool
) -> None:
    backend = tiny_backend()
    if decodes:
        backend.decoder = decoders.Sequence([decoders.Replace(*step) for step in steps])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Replace(*step) for step in steps])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ModelError, match=f"{'decoder' if decodes else 'normalizer'} makes up to .* at most 256"
    ):
        Tokenizer.from_dir(tmp_path)


def test_missing_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory"):
        Tokenizer.from_dir(tmp_path / "absent")
    (tmp_path / "tekken.json").touch()
    with pytest.raises(ModelError, match=r"tekken\.json but no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(ModelError, match="empty vocabulary"):
        Tokenizer.from_dir(save(empty, tmp_path / "empty"))


def test_a_directory_with_tokenizer_json_alone(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_dir / "tokenizer.json", tmp_path)
    ours = Tokenizer.from_dir(tmp_path)
    assert ours.decode(ours.encode("hello thé")) == "hello thé"
    assert ours.eos_token_id is None
