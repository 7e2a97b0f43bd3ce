"""Adapters over HTTP: names, vLLM's endpoints, versions under traffic, and what strangers send."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.adapter_server import MODEL, serve_model
from tests.api.helpers import SECONDS, Server, wait_until
from tests.serving.helpers import write_tiny_model
from tests.serving.peft_adapters import agreement_with_peft, write_adapter
from tokenloom.serving import adapter_service

PROMPT = [1, 70, 9, 200, 33, 33, 5]
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "logprobs": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(folder / name, i, rank=2 + i) for i, name in enumerate(("red", "blue", "green"))
    }


@pytest.fixture
def server(model: Path, directories: dict[str, Path]) -> Iterator[Server]:
    with serve_model(model, adapter=(f"red={directories['red']}",)) as running:
        yield running


def load(server: Server, name: Any, path: Any, **options: Any) -> Any:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **options})


def unload(server: Server, name: str) -> Any:
    return server.post("/v1/unload_lora_adapter", {"lora_name": name})


def answer(server: Server, model: str, **options: Any) -> dict[str, Any]:
    """The one choice of a completion, less what differs from request to request."""
    response = server.post("/v1/completions", {"model": model, **GREEDY, "return_token_ids": True, **options})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["choices"][0]
    return found


def error(response: Any, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert body["code"] == code
    message: str = body["message"]
    assert "Traceback" not in message
    return message


def listed(server: Server) -> dict[str, Any]:
    return {entry["name"]: entry for entry in server.get("/admin/adapters").json()["data"]}


def test_every_way_to_name_an_adapter(server: Server, model: Path, directories: dict[str, Path]) -> None:
    base, red = answer(server, MODEL), answer(server, "red")
    assert answer(server, "") == base
    assert answer(server, f"{MODEL}:red") == red
    assert red["token_ids"] != base["token_ids"]
    assert agreement_with_peft(model, directories["red"], PROMPT, red["token_ids"]) > 8
    assert agreement_with_peft(model, None, PROMPT, base["token_ids"]) > 8
    for name in ("blue", f"{MODEL}:blue", "Red", "red:red", f"{MODEL}:", f"{MODEL}:{MODEL}"):
        response = server.post("/v1/completions", {"model": name, "prompt": "x"})
        assert error(response, 404, "model_not_found").endswith("Served here: tiny, red.")
    assert "as the model" in error(
        server.post("/v1/completions", {"prompt": "x", "lora_request": {"name": "red"}}),
        400,
        "unsupported_feature",
    )
    chats = [
        server.post(
            "/v1/chat/completions",
            {
                "model": name,
                "messages": [{"role": "user", "content": "a"}],
                "temperature": 0,
                "max_tokens": 9,
            },
        ).json()
        for name in (MODEL, "red")
    ]
    assert [chat["model"] for chat in chats] == [MODEL, "red"]
    assert chats[0]["choices"] != chats[1]["choices"]
    assert chats[0]["system_fingerprint"] != chats[1]["system_fingerprint"]
    assert server.post("/tokenize", {"model": "red", "prompt": "ab"}).json()["count"] > 0


def test_models_list_their_adapters(server: Server, directories: dict[str, Path]) -> None:
    base, red = server.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"]) == (MODEL, None)
    assert (red["id"], red["parent"], red["root"]) == ("red", MODEL, str(directories["red"]))
    for name in ("red", f"{MODEL}:red"):
        assert server.get(f"/v1/models/{name}").json() == red
    assert load(server, "team/x", directories["blue"]).status_code == 200
    assert server.get("/v1/models/team/x").json()["id"] == "team/x"
    assert server.post("/admin/adapters/team/x/pin").json()["pinned"] is True
    error(server.get("/v1/models/blue"), 404, "model_not_found")


def test_the_official_client(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=SECONDS) as client:
        assert [entry.id for entry in client.models.list()] == [MODEL, "red"]
        assert client.models.retrieve("red").id == "red"
        expected = answer(server, "red", max_tokens=16)["text"]
        for stream in (False, True):
            made = client.completions.create(
                model=f"{MODEL}:red", prompt=PROMPT, temperature=0, stream=stream
            )
            texts = [made.choices[0].text] if not stream else [chunk.choices[0].text for chunk in made]  # type: ignore[union-attr,attr-defined]
            assert "".join(texts) == expected
        with pytest.raises(openai.NotFoundError, match="Served here: tiny, red"):
            client.completions.create(model="nobody", prompt="x")


def test_load_and_unload_as_in_vllm(server: Server, directories: dict[str, Path]) -> None:
    response = load(server, "blue", directories["blue"])
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'blue' added successfully.")
    assert response.headers["content-type"].startswith("text/plain")
    blue = answer(server, "blue")
    assert blue != answer(server, "red")
    assert "load_inplace" in error(load(server, "blue", directories["green"]), 400, "already_loaded")
    assert answer(server, "blue") == blue
    assert load(server, "blue", directories["green"], load_inplace=True).status_code == 200
    assert answer(server, "blue") != blue
    assert listed(server)["blue"]["version"] == 2
    response = unload(server, "blue")
    assert (response.status_code, response.text) == (
        200,
        "Success: LoRA adapter 'blue' removed successfully.",
    )
    error(unload(server, "blue"), 404, "adapter_not_found")
    error(unload(server, ""), 400, "missing_required_parameter")
    error(load(server, "", directories["blue"]), 400, "missing_required_parameter")
    error(load(server, "blue", ""), 400, "missing_required_parameter")
    error(server.post("/v1/completions", {"model": "blue", "prompt": "x"}), 404, "model_not_found")


def test_running_requests_keep_their_version(server: Server, directories: dict[str, Path]) -> None:
    """Names are replaced and unloaded again and again; every stream is that of one version, from end to end."""
    directory = {"red": directories["red"], "blue": directories["blue"], "green": directories["green"]}
    versions = []
    for name, path in directory.items():
        load(server, f"only-{name}", path)
        versions.append(answer(server, f"only-{name}", max_tokens=60))
    expected = [version["token_ids"] for version in versions]
    seen: list[tuple[list[int], str]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            events = server.events(
                "/v1/completions", {"model": "red", **GREEDY, "max_tokens": 60, "return_token_ids": True}
            )
            tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
            seen.append((tokens, events[0]["system_fingerprint"]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(6):
        name = list(directory)[i % 3]
        assert load(server, "red", directory[name], load_inplace=True).status_code == 200
        for other in ("a", "b"):
            unload(server, other)
            assert load(server, other, directories["blue"]).status_code == 200
        versions_seen = len(seen)
        wait_until(lambda: len(seen) > versions_seen)  # noqa: B023 (called at once)
    stop.set()
    for thread in threads:
        thread.join(SECONDS)
    assert all(tokens in expected for tokens, _ in seen)
    assert len({fingerprint for _, fingerprint in seen}) == 3
    assert len({str(tokens) for tokens, _ in seen}) == 3
    wait_until(server.is_idle)
    server.engine.check()


def test_a_version_is_gone_with_its_last_request(server: Server, directories: dict[str, Path]) -> None:
    old = listed(server)["red"]["content_id"]
    response: list[dict[str, Any]] = []
    expected = answer(server, "red", max_tokens=200)
    thread = threading.Thread(target=lambda: response.append(answer(server, "red", max_tokens=200)))
    thread.start()
    wait_until(lambda: server.engine.adapters.users.get(old, 0) == 1)
    assert load(server, "red", directories["blue"], load_inplace=True).status_code == 200
    assert listed(server)["red"]["content_id"] != old
    thread.join(SECONDS)
    assert response == [expected]
    host = server.engine.adapters.source
    wait_until(lambda: old not in host._images)  # type: ignore[attr-defined]
    wait_until(lambda: old not in server.engine.adapters.resident)


def test_prefixes_are_not_shared_between_versions(server: Server, directories: dict[str, Path]) -> None:
    """One name, two contents, one long prompt: nothing of the first is found by the second."""
    prompt = [i % 250 for i in range(100)]
    expected = []
    for name in ("red", "blue"):
        load(server, f"fresh-{name}", directories[name])
        expected.append(answer(server, f"fresh-{name}", prompt=prompt))
    usages = []
    for name in ("red", "blue", "red"):
        assert load(server, "same", directories[name], load_inplace=True).status_code == 200
        body = {"model": "same", **GREEDY, "prompt": prompt, "return_token_ids": True}
        found = server.post("/v1/completions", body).json()
        assert found["choices"][0] == expected[name == "blue"]
        usages.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
    # fresh-red and fresh-blue have the very contents: those pages are theirs too.
    assert usages == [96, 96, 96]
    body = {"model": MODEL, **GREEDY, "prompt": prompt}
    assert server.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_what_an_operator_sees(server: Server, directories: dict[str, Path]) -> None:
    load(server, "idle", directories["green"])
    answer(server, "red")
    answer(server, f"{MODEL}:red")
    found = listed(server)
    red = found["red"]
    assert (red["parent"], red["rank"], red["requests_total"], red["requests_live"]) == (MODEL, 2, 2, 0)
    assert red["resident_bytes"] == 64 << 10
    assert red["last_used"] >= red["created"] > 1e9
    assert (found["idle"]["resident_bytes"], found["idle"]["last_used"], found["idle"]["pinned"]) == (
        0,
        None,
        False,
    )
    assert server.post("/admin/adapters/idle/pin").json()["pinned"] is True
    assert server.post("/admin/adapters/idle/unpin").json()["pinned"] is False
    error(server.post("/admin/adapters/nobody/pin"), 404, "adapter_not_found")
    text = server.get("/metrics").text
    for line in (
        "tokenloom_adapters_loaded 2.0",
        "tokenloom_adapters_resident 1.0",
        "tokenloom_adapters_resident_bytes 65536.0",
        'tokenloom_adapter_resident_bytes{adapter="red"} 65536.0',
        'tokenloom_adapter_resident_bytes{adapter="idle"} 0.0',
        'tokenloom_adapter_requests_total{adapter="red"} 2.0',
        'tokenloom_adapter_requests_total{adapter="idle"} 0.0',
        'tokenloom_adapters_fetched_total{model_name="tiny"} 1.0',
    ):
        assert line in text.splitlines(), line


def test_labels_are_bounded(
    server: Server, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenloom.api.adapter_metrics.MAX_LABELS", 2)
    for i in range(4):
        load(server, f"n{i}", directories["blue"])
    answer(server, "n3")
    answer(server, "n2")
    text = server.get("/metrics").text
    assert 'tokenloom_adapter_requests_total{adapter="_other"} 0.0' in text
    assert text.count("tokenloom_adapter_requests_total{") == 3
    assert "tokenloom_adapters_resident 1.0" in text, "names of one content are one adapter"


BAD_NAMES = ["../x", "a:b", MODEL, "x" * 200, "a b", "/etc", "a//b", "-x", "é", "_other", "a\n"]


def test_hostile_loads_change_nothing(server: Server, tmp_path: Path, directories: dict[str, Path]) -> None:
    before, red = listed(server), answer(server, "red")
    for name in BAD_NAMES:
        error(load(server, name, directories["blue"]), 400, "invalid_value")
    for path in (
        "/nowhere",
        "\0",
        "x" * 10_000,
        directories["blue"] / "adapter_config.json",
        "red/../../..\0",
    ):
        error(load(server, "x", path), 404, "adapter_not_found")
    bad = tmp_path / "bad"

    def damage(name: str, data: bytes | None) -> str:
        write_adapter(bad, 5)
        (bad / name).unlink()
        if data is not None:
            (bad / name).write_bytes(data)
        return error(load(server, "red", bad, load_inplace=True), 400, "invalid_adapter")

    config, weights = "adapter_config.json", "adapter_model.safetensors"
    assert "adapter_config.json" in damage(config, None)
    damage(config, b"{")
    damage(config, b"[" * 100_000)
    assert "use_dora" in damage(config, json.dumps(_config(directories) | {"use_dora": True}).encode())
    damage(weights, None)
    whole = (directories["blue"] / weights).read_bytes()
    damage(weights, whole[:-10])
    damage(weights, b"\xff" * 100)
    (bad / weights).unlink()
    (bad / weights).symlink_to("/etc/passwd")
    assert "links out" in error(load(server, "red", bad, load_inplace=True), 400, "invalid_adapter")
    for body in (
        b"",
        b"[]",
        b"{",
        b'{"lora_name": 5, "lora_path": "x"}',
        b'{"lora_name": "x", "lora_pth": "y"}',
    ):
        assert server.post("/v1/load_lora_adapter", content=body).status_code == 400
    assert listed(server) | {"red": before["red"]} == before
    assert answer(server, "red") == red


def _config(directories: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directories["blue"] / "adapter_config.json").read_text())
    return found


def test_an_adapter_that_is_too_large(model: Path, tmp_path: Path, directories: dict[str, Path]) -> None:
    large = write_adapter(tmp_path / "large", 1, rank=200)
    with serve_model(model, max_adapter_mb=1, max_adapter_rank=200) as server:
        assert "at most 1024 KiB" in error(load(server, "large", large), 400, "invalid_value")
        assert load(server, "blue", directories["blue"]).status_code == 200
        assert list(listed(server)) == ["blue"]
    with serve_model(model, max_adapter_rank=3) as server:
        assert "rank 200" in error(load(server, "large", large), 400, "invalid_adapter")


def test_many_load_one_name_at_a_time(server: Server, directories: dict[str, Path]) -> None:
    """One of them gets it; the others hear that it is taken."""
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(load(server, "x", directories["blue"])))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    taken = [response for response in answers if response.status_code != 200]
    assert (len(answers), len(taken)) == (6, 5)
    for response in taken:
        error(response, 400, "already_loaded")


def test_a_refused_load_takes_nothing_from_other_names(model: Path, tmp_path: Path) -> None:
    """The content of a second name is known already, and a pin leaves no room for it now."""
    one, two = write_adapter(tmp_path / "one", 1, rank=200), write_adapter(tmp_path / "two", 2, rank=200)
    with serve_model(model, max_adapter_mb=2, adapter=(f"one={one}", f"two={two}")) as server:
        before = answer(server, "one")
        assert server.post("/admin/adapters/two/pin").status_code == 200
        error(load(server, "again", one), 400, "invalid_value")
        assert server.post("/admin/adapters/two/unpin").status_code == 200
        assert answer(server, "one") == before
        assert load(server, "again", one).status_code == 200
        assert answer(server, "again") == before


def test_who_may_load_from_where(model: Path, tmp_path: Path, directories: dict[str, Path]) -> None:
    outside = write_adapter(tmp_path / "outside", 1)
    root = tmp_path / "root"
    write_adapter(root / "inside", 2)
    (root / "link").symlink_to(outside)
    with serve_model(model, adapter_root=str(root)) as server:
        for path in (outside, "../outside", root / "link", "link", "/"):
            error(load(server, "x", path), 403, "forbidden_path")
        assert load(server, "x", "inside").status_code == 200
        assert load(server, "y", root / "inside").status_code == 200
    with serve_model(model, host="0.0.0.0") as server:
        assert "adapter_root" in error(load(server, "x", outside), 403, "forbidden_path")
    with serve_model(model, host="0.0.0.0", api_key="secret") as server:
        error(load(server, "x", outside), 401, "invalid_api_key")
        error(server.get("/admin/adapters"), 401, "invalid_api_key")
        headers = {"Authorization": "Bearer secret"}
        body = {"lora_name": "x", "lora_path": str(outside)}
        assert server.post("/v1/load_lora_adapter", body, headers=headers).status_code == 200


def test_a_watched_directory(
    model: Path, tmp_path: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_service, "WATCH_SECONDS", 0.02)
    watched = tmp_path / "watched"
    write_adapter(watched / "one", 1)
    (watched / "broken").mkdir()
    (watched / "broken" / "adapter_config.json").write_text("{")
    write_adapter(watched / "fixed", 4)
    with serve_model(model, adapter_dir=str(watched), adapter=(f"fixed={directories['red']}",)) as server:
        names = ["fixed", "one"]
        assert list(listed(server)) == names
        assert listed(server)["fixed"]["source"] == str(directories["red"])
        write_adapter(watched / "two", 2)
        wait_until(lambda: list(listed(server)) == [*names, "two"])
        first, two = answer(server, "one"), answer(server, "two")
        write_adapter(watched / "one", 2)
        wait_until(lambda: answer(server, "one") == two)
        assert first != two
        write_adapter(watched / "fixed", 2)
        write_adapter(watched / "broken", 3)
        wait_until(lambda: "broken" in listed(server))
        assert answer(server, "fixed") != two, "the name of another one"
        for path in (watched / "two").iterdir():
            path.unlink()
        wait_until(lambda: "two" not in listed(server))
        assert answer(server, "one") == two, "the same content under another name"


def test_names_outlast_the_server(model: Path, tmp_path: Path, directories: dict[str, Path]) -> None:
    data = tmp_path / "data"
    with serve_model(model, data_dir=str(data)) as server:
        for name in ("red", "blue", "green"):
            load(server, name, directories[name])
        red, green_before = answer(server, "red"), answer(server, "green")
        unload(server, "blue")
        with pytest.raises(Exception, match="no other process"), serve_model(model, data_dir=str(data)):
            pass
    (green,) = (entry.content_id for entry in _entries(data) if entry.name == "green")
    stored = data / "adapters" / f"{green}.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"\0")
    (data / "images" / "left.part").write_bytes(b"x")
    with serve_model(model, data_dir=str(data)) as server:
        assert list(listed(server)) == ["red"]
        assert answer(server, "red") == red
        for kept in ((data / "images").iterdir(), (data / "adapters").glob("*.safetensors")):
            assert len(list(kept)) == 2, "the unloaded one is gone, the damaged one is left alone"
        assert load(server, "green", directories["green"]).status_code == 200
        assert answer(server, "green") == green_before


def _entries(data: Path) -> Any:
    from tokenloom.adapters.registry import AdapterRegistry

    registry = AdapterRegistry(data / "adapters.sqlite")
    try:
        return registry.list()
    finally:
        registry.close()


def test_more_adapters_than_the_pool_holds(model: Path, tmp_path: Path) -> None:
    """200 adapters, room for 16 (one MiB of pages of 64 KiB): each request gets what its adapter says."""
    paths = [write_adapter(tmp_path / f"t{i}", i, rank=1) for i in range(200)]
    with serve_model(model, max_adapter_mb=1, adapter=tuple(f"{p.name}={p}" for p in paths)) as server:
        alone = answer(server, "t7")
        answers: dict[int, dict[str, Any]] = {}

        def ask(numbers: range) -> None:
            for i in numbers:
                answers[i] = answer(server, f"t{i}")

        threads = [threading.Thread(target=ask, args=(range(i, 200, 8),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(answers) == 200
        assert answers[7] == alone
        assert len({str(found["token_ids"]) for found in answers.values()}) > 150
        for i in (0, 99, 199):
            assert agreement_with_peft(model, paths[i], PROMPT, answers[i]["token_ids"]) > 8
        assert server.engine.adapters.stats.num_evicted >= 184
        resident = [entry for entry in listed(server).values() if entry["resident_bytes"]]
        assert len(resident) == 16


def test_an_engine_without_adapters_says_so(tokenizer_directory: Path, directories: dict[str, Path]) -> None:
    from tests.api.helpers import serve

    with serve(tokenizer_directory) as server:
        error(load(server, "red", directories["red"]), 400, "unsupported_feature")
        assert server.get("/admin/adapters").json()["data"] == []


def test_adapters_with_one_for_the_draft(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded, replaced and forgotten with the adapter in whose directory they lie; they are watched too."""
    monkeypatch.setattr(adapter_service, "WATCH_SECONDS", 0.02)
    # The process that prepares them gets what others leave; a machine may be busy.
    wait = partial(wait_until, seconds=120.0)
    watched, data = tmp_path / "watched", tmp_path / "data"
    one = write_adapter(watched / "one", 1)
    mine = write_adapter(tmp_path / "mine", 2)
    with serve_model(model, adapter_dir=str(watched)) as server:
        plain = answer(server, "one", max_tokens=60)
    options = {"speculate": ("draft",), "draft_model": (str(model),), "draft_pace": "fixed"}
    with serve_model(model, adapter_dir=str(watched), data_dir=str(data), **options) as server:

        def count() -> tuple[int, int]:
            folders = (data / "images").iterdir(), (data / "adapters").glob("*.safetensors")
            images, stored = (len(list(folder)) for folder in folders)
            return images, stored

        def drafts(name: str) -> dict[str, str]:
            found: dict[str, str] = listed(server)[name]["drafts"]
            return found

        assert drafts("one") == {}
        write_adapter(one / "draft", 1)
        wait(lambda: drafts("one") == {"draft": listed(server)["one"]["content_id"]})
        assert answer(server, "one", max_tokens=60) == plain
        assert count() == (1, 1), "the same content"
        assert listed(server)["one"]["version"] == 1
        write_adapter(one / "draft", 3)
        wait(lambda: drafts("one")["draft"] != listed(server)["one"]["content_id"])
        assert count() == (2, 2)
        write_adapter(mine / "draft", 3)
        assert load(server, "mine", mine).status_code == 200
        assert drafts("mine") == drafts("one")
        assert count() == (3, 3)
        write_adapter(mine / "draft", 4)
        assert load(server, "mine", mine, load_inplace=True).status_code == 200
        assert drafts("mine") != drafts("one")
        assert count() == (4, 4)
        (mine / "draft" / "adapter_model.safetensors").write_bytes(b"x" * 99)
        assert "mine/draft" in error(load(server, "mine", mine, load_inplace=True), 400, "invalid_adapter")
        assert count() == (4, 4)
        assert answer(server, "one", max_tokens=60) == plain
        for path in (one / "draft").iterdir():
            path.unlink()
        (one / "draft").rmdir()
        wait(lambda: drafts("one") == {})
        wait(lambda: count() == (3, 3))
        assert unload(server, "mine").status_code == 200
        wait(lambda: count() == (1, 1))
        assert answer(server, "one", max_tokens=60) == plain
