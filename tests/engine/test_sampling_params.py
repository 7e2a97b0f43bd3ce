"""Limits of the sampling parameters, and what None means."""

from __future__ import annotations

from typing import Any

import pytest

from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", float("nan"), "from 0 to 100"),
        ("temperature", True, "from 0 to 100"),
        ("top_p", 0, "above 0"),
        ("top_k", 1 << 31, "from -1 to 2147483647"),
        ("repetition_penalty", 1e-40, "from 0.01"),
        ("max_tokens", 10**400, "from 0 to 2147483647"),
        ("seed", 10**400, "64-bit"),
        ("n", 10**6, "from 1 to 128"),
        ("logprobs", 65, "from 0 to 64"),
        ("logit_bias", {"\u00b2": 1.0}, "token ids"),
        ("logit_bias", {"--5": 1.0}, "token ids"),
        ("logit_bias", {5: 101}, "-100 to 100"),
        ("stop", [""], "1 to 1024 characters"),
        ("stop", ["a"] * 17, "at most 16"),
        ("stop_token_ids", ["1"], "token ids"),
        ("allowed_token_ids", [], "at least one"),
        ("ignore_eos", 1, "true or false"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(name: str, value: Any, limit: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert limit in str(caught.value)


def test_none_means_nothing() -> None:
    params = SamplingParams(**dict.fromkeys(("stop", "stop_token_ids", "bad_words", "logit_bias")))
    assert params == SamplingParams()


def test_forms_that_clients_send() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3], logit_bias={"5": 1, "-1": 2})
    assert params.stop == ("end",) and params.stop_token_ids == (3,) and params.logit_bias == {5: 1, -1: 2}
    with pytest.raises(InvalidParameter, match="from 0 to 9"):
        params.check_vocabulary(10)


def test_min_tokens_fit_into_max_tokens() -> None:
    with pytest.raises(InvalidParameter, match="min_tokens"):
        SamplingParams(min_tokens=9, max_tokens=8)
