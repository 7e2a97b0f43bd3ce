"""The configuration tree: defaults, precedence, conversions, errors."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.config import Config, flatten, knobs, make_config
from tokenloom.errors import InvalidParameter

NAMES = [entry.name for entry in knobs()]


def refused(**given: object) -> InvalidParameter:
    with pytest.raises(InvalidParameter) as caught:
        make_config(given, env={})
    return caught.value


def test_defaults() -> None:
    config = make_config(env={})
    assert config == Config()
    assert config.server.host == "127.0.0.1"
    assert config.server.port == 8000
    assert flatten(config) == {entry.name: entry.default for entry in knobs()}


def test_the_tree_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make_config(env={}).server.port = 1  # type: ignore[misc]


def test_environment() -> None:
    env = {"TOKENLOOM_PORT": "9000", "TOKENLOOM_PREFIX_CACHE": "no", "TOKENLOOM_TARGET_ITL_MS": "12.5"}
    config = make_config(env=env)
    assert config.server.port == 9000
    assert config.cache.prefix_cache is False
    assert config.scheduler.target_itl_ms == 12.5


def test_the_real_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_MAX_RUNNING", "7")
    assert make_config().scheduler.max_running == 7


def test_file_with_tables_and_flat_names(tmp_path: Path) -> None:
    file = tmp_path / "tokenloom.toml"
    file.write_text('max_waiting = 5\n[server]\nport = 81\nhost = "0.0.0.0"\n[cache]\nprefix_cache = false\n')
    config = make_config(file=file, env={})
    assert (config.scheduler.max_waiting, config.server.port, config.server.host) == (5, 81, "0.0.0.0")
    assert config.cache.prefix_cache is False


def test_precedence_is_values_then_environment_then_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenloom.toml"
    file.write_text("port = 1\nmax_running = 1\nmax_waiting = 1\n")
    env = {"TOKENLOOM_PORT": "2", "TOKENLOOM_MAX_RUNNING": "2"}
    config = make_config({"port": 3}, file=file, env=env)
    assert (config.server.port, config.scheduler.max_running, config.scheduler.max_waiting) == (3, 2, 1)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("port", 65536, "0 to 65535"),
        ("port", -1, "0 to 65535"),
        ("port", "eighty", "of type int"),
        ("port", True, "of type int"),
        ("port", 80.0, "of type int"),
        ("max_batch_tokens", 0, "at least 1"),
        ("threads", -1, "0 to 256"),
        ("threads", 2000, "0 to 256"),
        ("max_context", -1, "at least 0"),
        ("target_itl_ms", "fast", "of type float"),
        ("prefix_cache", "maybe", "of type bool"),
        ("prefix_cache", 1, "of type bool"),
        ("policy", "random", "one of fcfs, priority, slo"),
        ("dtype", "int4", "one of auto, float32, bfloat16, float16"),
        ("host", 127, "of type str"),
        ("model", None, "of type str"),
    ],
)
def test_errors_name_field_value_and_limit(name: str, value: object, limit: str) -> None:
    error = refused(**{name: value})
    assert (error.param, error.value, error.limit) == (name, value, limit)
    assert name in str(error)
    assert repr(value) in str(error)
    assert limit in str(error)


def test_unknown_names_list_the_known_ones() -> None:
    error = refused(max_batch_token=3)
    assert error.param == "max_batch_token"
    assert "max_batch_tokens" in error.limit


def test_errors_of_environment_and_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="max_running: got 'x'"):
        make_config(env={"TOKENLOOM_MAX_RUNNING": "x"})
    file = tmp_path / "tokenloom.toml"
    file.write_text("[server]\nprot = 1\n")
    with pytest.raises(InvalidParameter, match="prot"):
        make_config(file=file, env={})
    file.write_text("port = = 1\n")
    with pytest.raises(InvalidParameter, match="a readable TOML file"):
        make_config(file=file, env={})
    with pytest.raises(InvalidParameter, match="a readable TOML file"):
        make_config(file=tmp_path / "none.toml", env={})


def test_whole_numbers_stand_for_floats() -> None:
    config = make_config({"target_itl_ms": 20}, env={})
    assert type(config.scheduler.target_itl_ms) is float


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=8)))
def test_any_text_gives_a_tree_or_a_named_error(values: dict[str, str]) -> None:
    try:
        effective = flatten(make_config(values, env={}))
    except InvalidParameter as error:
        accepted = error.param in values
    else:
        texts = {name: value for name, value in effective.items() if type(value) is str}
        accepted = all(texts.get(name, text) == text for name, text in values.items())
    assert accepted


def test_flags_and_environment_names() -> None:
    entry = next(entry for entry in knobs() if entry.name == "max_batch_tokens")
    assert (entry.flag, entry.env) == ("--max-batch-tokens", "TOKENLOOM_MAX_BATCH_TOKENS")


def test_several_texts(tmp_path: Path) -> None:
    assert make_config(env={"TOKENLOOM_ADAPTER": "a=/x, b=/y,"}).adapters.adapter == ("a=/x", "b=/y")
    assert make_config({"adapter": ["a=/x,y"]}, env={}).adapters.adapter == ("a=/x,y",)
    file = tmp_path / "tokenloom.toml"
    file.write_text('[adapters]\nadapter = ["a=/x"]\n')
    assert make_config(file=file, env={}).adapters.adapter == ("a=/x",)
    for names in ("draft, ngram", ["draft,ngram"], ["draft", "ngram"]):
        assert make_config({"speculate": names}, env={}).speculation.speculate == ("draft", "ngram")
    for unknown in ("ngrams", ["ngram", "ngram"], "ngram,ngram", ["draft,other"]):
        assert refused(speculate=unknown).limit == "each at most once of draft, ngram"
    for bad in (5, [5], {"a": "/x"}, [["a=/x"]]):
        assert refused(adapter=bad).param == "adapter"
