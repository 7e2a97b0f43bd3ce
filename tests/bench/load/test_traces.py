"""Trace parsers, on lines written here and on the published files; errors name file, line and field."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenloom.bench.load.traces import (
    MAX_NESTED,
    READERS,
    detect_format,
    read_azure,
    read_custom,
    read_mooncake,
)
from tokenloom.bench.load.workload import (
    Session,
    count_turns,
    first_requests,
    limit_tokens,
    scale_lengths,
    speed_up,
)
from tokenloom.errors import InvalidParameter

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:18:04.0319607,10,0
"""
MOONCAKE = {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 60]}
AIBRIX = {
    "timestamp": 6011,
    "requests": [
        {"Prompt Length": 178, "Output Length": 8, "prompt": "Hello"},
        {"Prompt Length": 7, "Output Length": 3},
    ],
}


def agent_turn(t: float, tokens: int, runs: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": tokens, "out": 5, "hash_runs": runs, "api_time": 2.0, **more}


AGENT = {
    "id": "a",
    "block_size": 64,
    "hash_id_scope": "local",
    "requests": [
        agent_turn(0.0, 200, [[1, 3]], think_time=0.0),
        agent_turn(10.0, 300, [[1, 2], [9, 2]], think_time=4.5),
        {"t": 13.0, "type": "subagent", "requests": [agent_turn(0.0, 70, [[20, 1]], think_time=0.0)]},
        agent_turn(20.0, 320, [[1, 5]]),
    ],
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def sessions(kind: str, path: Path) -> list[Session]:
    return list(READERS[kind](path))


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(AZURE)
    assert detect_format(path) == "azure"
    found = sessions("azure", path)
    assert [s.start for s in found] == pytest.approx([0.0, 0.052, 60.0520007], abs=1e-6)
    assert [(s.turns[0].input_tokens, s.turns[0].output_tokens) for s in found] == [
        (4808, 10),
        (3180, 8),
        (10, 1),
    ]


def test_mooncake(tmp_path: Path) -> None:
    path = write(tmp_path / "m", MOONCAKE)
    assert detect_format(path) == "mooncake"
    (found,) = sessions("mooncake", path)
    assert found.start == pytest.approx(27.482)
    turn = found.turns[0]
    assert (turn.input_tokens, turn.output_tokens, turn.block_tokens) == (1100, 52, 512)
    assert turn.blocks == ((46, 2), (60, 1))


def test_aibrix(tmp_path: Path) -> None:
    path = write(tmp_path / "x", AIBRIX)
    assert detect_format(path) == "aibrix"
    first, second = sessions("aibrix", path)
    assert (first.start, first.turns[0].text, first.turns[0].input_tokens) == (6.011, "Hello", 178)
    assert (second.start, second.turns[0].text, second.turns[0].output_tokens) == (6.011, None, 3)


def test_coding_agent(tmp_path: Path) -> None:
    path = write(tmp_path / "c", AGENT, AGENT)
    assert detect_format(path) == "coding-agent"
    first, second = sessions("coding-agent", path)
    assert [turn.delay for turn in first.turns] == [0.0, 4.5, 8.0]  # not recorded: 20 - (10 + 2)
    assert first.turns[1].blocks == ((1, 2), (9, 2))
    (sub,) = first.turns[1].then
    assert (sub.start, sub.turns[0].input_tokens) == (1.0, 70)  # 13 - (10 + 2)
    assert {turn.scope for turn in first.turns} == {0}
    assert {turn.scope for turn in second.turns} == {1}
    assert count_turns([first]) == 4


def test_gzip_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.gz"
    path.write_bytes(gzip.compress(json.dumps(MOONCAKE).encode()))
    assert detect_format(path) == "mooncake"
    assert len(list(read_mooncake(path))) == 1
    path.write_bytes(gzip.compress(json.dumps(MOONCAKE).encode())[:-9])
    with pytest.raises(InvalidParameter, match="readable as text, or gzip"):
        list(read_mooncake(path))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("mooncake", {**MOONCAKE, "input_length": 0}, "input_length"),
    ("mooncake", {**MOONCAKE, "input_length": True}, "input_length"),
    ("mooncake", {**MOONCAKE, "input_length": 10**12}, "input_length"),
    ("mooncake", {**MOONCAKE, "timestamp": -1}, "timestamp"),
    ("mooncake", {**MOONCAKE, "hash_ids": [1, 2]}, "hash_ids"),
    ("mooncake", {**MOONCAKE, "hash_ids": [1, 2, -3]}, "hash_ids"),
    ("mooncake", {**MOONCAKE, "hash_ids": None}, "hash_ids"),
    ("mooncake", {**MOONCAKE, "output_length": "5"}, "output_length"),
    ("mooncake", {**MOONCAKE, "timestamp": 10**400}, "timestamp"),
    ("aibrix", {**AIBRIX, "requests": []}, "requests"),
    ("aibrix", {**AIBRIX, "requests": [{"Prompt Length": 1}]}, r"requests\[0\].Output Length"),
    ("aibrix", {"timestamp": 0, "requests": [{**AIBRIX["requests"][0], "prompt": 5}]}, r"\[0\].prompt"),
    ("coding-agent", {**AGENT, "block_size": 0}, "block_size"),
    ("coding-agent", {**AGENT, "hash_id_scope": "global"}, "hash_id_scope"),
    ("coding-agent", {**AGENT, "requests": [agent_turn(0, 200, [[1, 4]])]}, r"requests\[0\].hash_runs"),
    ("coding-agent", {**AGENT, "requests": [agent_turn(0, 64, [[1]])]}, r"requests\[0\].hash_runs"),
    ("coding-agent", {**AGENT, "requests": [AGENT["requests"][2]]}, r"requests\[0\].type"),
]


@pytest.mark.parametrize(
    ("kind", "row", "name"), BAD, ids=[f"{k}-{n}-{i}" for i, (k, _, n) in enumerate(BAD)]
)
def test_errors_name_file_line_and_field(kind: str, row: dict[str, Any], name: str, tmp_path: Path) -> None:
    good = {"mooncake": MOONCAKE, "aibrix": AIBRIX, "coding-agent": AGENT}[kind]
    path = write(tmp_path / "bad.jsonl", good, row)
    with pytest.raises(InvalidParameter, match=rf"bad\.jsonl: line 2: .*{name}"):
        list(READERS[kind](path))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("2023-11-16 18:17:03,5", "row"),
        ("yesterday,5,5", "TIMESTAMP"),
        ("x" * 200_000 + ",5,5", "TIMESTAMP"),
        ("2023-11-16 18:17:03.1e400,5,5", "TIMESTAMP"),
        ("0001-01-01 00:00:00,5,5", "TIMESTAMP"),
        ("2023-11-16,-5,5", "ContextTokens"),
        ("2023-11-16," + "9" * 5000 + ",5", "ContextTokens"),
    ],
)
def test_azure_errors(line: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(AZURE + line + "\n")
    with pytest.raises(InvalidParameter, match=rf"bad\.csv: line 5: {name}"):
        list(read_azure(path))
    path.write_text(AZURE[10:])
    with pytest.raises(InvalidParameter, match="line 1: header"):
        list(read_azure(path))


def test_sessions_within_sessions_end_somewhere(tmp_path: Path) -> None:
    def nested(depth: int) -> Path:
        requests = [agent_turn(0, 64, [[1, 1]])]
        for _ in range(depth):
            requests = [agent_turn(0, 64, [[1, 1]]), {"type": "subagent", "t": 0, "requests": requests}]
        return write(tmp_path / "deep.jsonl", {**AGENT, "requests": requests})

    [session] = READERS["coding-agent"](nested(MAX_NESTED))
    assert count_turns([speed_up(session, 2.0)]) == MAX_NESTED + 1
    with pytest.raises(InvalidParameter, match="at most 32 of them deep"):
        list(READERS["coding-agent"](nested(MAX_NESTED + 1)))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n", b"[1]\n", b"hello\n", b"\xff\xfe\n", b'{"a": 1'])
def test_what_is_no_trace_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(InvalidParameter, match=str(path)):
        detect_format(path)
    with pytest.raises(InvalidParameter):
        detect_format(tmp_path)


def test_custom_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p", {"prompt": "a", "output_tokens": 3}, {"prompt": "b"})
    assert [(turn.text, turn.output_tokens) for turn in read_custom(path, 9)] == [("a", 9), ("b", 9)]
    with pytest.raises(InvalidParameter, match="line 2: output_tokens"):
        list(read_custom(path, -1))


def test_first_requests_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "c", AGENT, {"block_size": "broken"})
    taken = first_requests(READERS["coding-agent"](path), 3)
    # Three of the four: two turns and the session that the second one starts.
    assert count_turns(taken) == 3
    assert len(taken[0].turns) == 2


def test_limit_tokens_leaves_out_and_keeps_what_others_started(tmp_path: Path) -> None:
    (session,) = sessions("coding-agent", write(tmp_path / "c", AGENT))
    kept, left_out = limit_tokens([session], 304)
    assert [turn.input_tokens for turn in kept[0].turns] == [200]
    assert (left_out, count_turns(kept)) == (2, 2)
    assert limit_tokens([session], 10) == ([], 4)


def test_scaled_lengths_keep_the_blocks(tmp_path: Path) -> None:
    (session,) = sessions("mooncake", write(tmp_path / "m", MOONCAKE))
    turn = scale_lengths(session, 1 / 64).turns[0]
    assert (turn.block_tokens, turn.input_tokens, turn.blocks) == (8, 18, ((46, 2), (60, 1)))
    with pytest.raises(InvalidParameter, match="--length-scale"):
        scale_lengths(session, 1 / 512)


Check = Callable[[list[Session]], None]


@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [
        ("azure2023/AzureLLMInferenceTrace_code.csv", "azure", None),
        ("azure2023/AzureLLMInferenceTrace_conv.csv", "azure", None),
        ("mooncake/conversation_trace.jsonl.gz", "mooncake", 6401),
        ("mooncake/synthetic_trace.jsonl.gz", "mooncake", 2254),
        ("aibrix/8min_up_and_down.jsonl.gz", "aibrix", 1214),
        ("agentic/coding_agent_sessions.jsonl.gz", "coding-agent", 463),
    ],
)
def test_published_traces(name: str, kind: str, rows: int | None, shared_data: Path) -> None:
    path = shared_data / "traces" / name
    if not path.is_file():
        pytest.skip(f"no {name} in the test data")
    assert detect_format(path) == kind
    found = sessions(kind, path)
    if rows is not None:
        assert len(found) == rows
    starts = [session.start for session in found]
    assert starts == sorted(starts)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "rt") as file:
        lines = list(file)
    if kind == "mooncake":
        raw = [json.loads(line) for line in lines]
        assert [s.turns[0].input_tokens for s in found] == [row["input_length"] for row in raw]
        unrolled = [[i + k for i, n in s.turns[0].blocks for k in range(n)] for s in found]
        assert unrolled == [row["hash_ids"] for row in raw]
    if kind == "azure":
        assert sum(s.turns[0].input_tokens for s in found) == sum(int(x.split(",")[1]) for x in lines[1:])
    if kind == "coding-agent":
        # 30,091 requests of the sessions themselves and 549 of those that they start.
        assert count_turns(found) == 30091 + 549
