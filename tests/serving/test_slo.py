"""SLOs as users write them: objectives in milliseconds, classes of the configuration, classes of API keys."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from tokenloom.config import Config, make_config
from tokenloom.engine.request import NO_SLO, Request, Slo
from tokenloom.errors import InvalidParameter
from tokenloom.serving.messages import Add, Command, decode_command, encode
from tokenloom.serving.slo import SloClasses, slo_of
from tokenloom.serving.supervisor import ProcessEngineClient

CLASSES = ("fast=tpot_ms:20,ttft_ms:300", "chat=tpot_ms:50", "batch.2=ttft_ms:6e4")


def config(**options: Any) -> Config:
    return make_config(options, env={})


def test_objectives() -> None:
    assert slo_of({"tpot_ms": 40, "ttft_ms": 500}) == Slo(0.04, 0.5)
    assert slo_of({"tpot_ms": 12.5}) == Slo(0.0125, inf)
    assert slo_of({"tpot_ms": None, "ttft_ms": 500.0}) == Slo(inf, 0.5)
    assert slo_of({}) == NO_SLO


@pytest.mark.parametrize("value", [0, -1, 0.001, 3_600_001, 10**400, nan, inf, -inf, True, "40", [40], {}])
@pytest.mark.parametrize("name", ["tpot_ms", "ttft_ms"])
def test_what_is_no_objective_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        slo_of({name: value})
    assert caught.value.param == f"slo.{name}"
    assert "milliseconds from 0.01 to 3600000" in str(caught.value)


def test_other_fields_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameter) as caught:
        slo_of({"tpot": None})
    assert caught.value.param == "slo.tpot"
    assert "tpot_ms, ttft_ms" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        config(slo_class=CLASSES),
        # The environment's text is cut at its commas.
        make_config(env={"TOKENLOOM_SLO_CLASS": ", ".join(CLASSES)}),
    ],
)
def test_classes(options: Config) -> None:
    classes = SloClasses(options)
    assert classes.find("fast") == Slo(0.02, 0.3)
    assert classes.find("chat") == Slo(0.05, inf)
    assert classes.find("batch.2") == Slo(inf, 60.0)
    assert classes.find(None) == NO_SLO
    assert classes.find({"ttft_ms": 1}) == Slo(inf, 0.001)
    assert classes.find(Slo(tpot=0.25)) == Slo(0.25, inf)
    with pytest.raises(InvalidParameter) as caught:
        classes.find("slow")
    assert caught.value.param == "slo"
    assert "batch.2, chat, fast" in str(caught.value)
    with pytest.raises(InvalidParameter, match="slo.tpot_ms"):
        classes.find(Slo(tpot=nan))


def test_without_classes_the_error_says_how_to_have_them() -> None:
    with pytest.raises(InvalidParameter, match="--slo-class"):
        SloClasses(config()).find("fast")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (("fast",), "slo_class"),
        (("tpot_ms:4",), "slo_class"),
        (("=tpot_ms:4",), "slo_class"),
        (("a b=tpot_ms:4",), "slo_class"),
        (("a=",), "slo_class"),
        (("a=tpot_ms",), "slo_class"),
        (("a=tpot_ms:4,",), "slo_class"),
        (("a=tpot_ms:4", "a=tpot_ms:5"), "slo_class"),
        (("a=tpot_ms:4,tpot_ms:5",), "slo_class"),
        (("a=tpot_ms:",), "slo_class a.tpot_ms"),
        (("a=tpot_ms:fast",), "slo_class a.tpot_ms"),
        (("a=tpot_ms:nan",), "slo_class a.tpot_ms"),
        (("a=tpot_ms:-4",), "slo_class a.tpot_ms"),
        (("a=tpot:4",), "slo_class a.tpot"),
    ],
)
def test_classes_that_cannot_be_read(given: tuple[str, ...], param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SloClasses(config(slo_class=given))
    assert caught.value.param == param


def test_keys() -> None:
    classes = SloClasses(config(slo_class=CLASSES, slo_key=("k1=fast", "k=2==chat")))
    assert classes.keys == {"k1": Slo(0.02, 0.3), "k=2=": Slo(0.05, inf)}


@pytest.mark.parametrize("bad", ["s3cret", "s3cret=slow", "=fast", "s3cret=", "k1=chat"])
def test_keys_that_cannot_be_read_are_not_shown(bad: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SloClasses(config(slo_class=CLASSES, slo_key=("k1=fast", bad)))
    assert caught.value.param == "slo_key"
    assert "entry 2" in str(caught.value)
    assert "s3cret" not in str(caught.value) and "k1" not in str(caught.value)


@pytest.mark.usefixtures("importable")
def test_an_slo_is_resumed_with_its_request(
    tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal gives the next engine has the SLO, on the wire too."""
    client = ProcessEngineClient(config(model=str(tokenizer_directory)))
    sent: list[Command] = []
    monkeypatch.setattr(client, "_send", sent.append)
    request = Request(request_id="r", prompt_token_ids=[1, 2], slo=Slo(ttft=0.5))
    client.journal.open(request)
    client._start_again()
    [command] = sent
    arrived = decode_command(encode(command))
    assert isinstance(arrived, Add)
    assert arrived.request == request
    assert arrived.request.slo == Slo(inf, 0.5)
    assert isinstance(arrived.request.slo, Slo)
