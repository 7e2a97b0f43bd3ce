"""Options made from the knobs."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from tokenloom.cli.main import app
from tokenloom.cli.options import changed_from_default, configured
from tokenloom.config import Config, knobs, make_config

run = CliRunner().invoke


def probe(*args: str, env: dict[str, str] | None = None) -> Config:
    """The tree that a command with these arguments gets."""
    seen: list[Config] = []
    command = typer.Typer()

    @command.command()
    @configured(("model", "cache", "scheduler", "server", "runtime"), model_argument=True)
    def show(*, config: Config) -> None:
        seen.append(config)

    result = CliRunner(env=env).invoke(command, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_nothing_given_is_the_default() -> None:
    assert probe() == make_config(env={})


def test_every_type_of_option() -> None:
    config = probe(
        "somewhere", "--port", "81", "--no-prefix-cache", "--target-itl-ms", "20", "--policy", "priority"
    )
    assert config.model.model == "somewhere"
    assert config.server.port == 81
    assert config.cache.prefix_cache is False
    assert config.scheduler.target_itl_ms == 20.0
    assert config.scheduler.policy == "priority"
    assert type(config.scheduler.policy) is str


def test_speculation_has_options_where_requests_are_served() -> None:
    for command in ("serve", "generate", "chat"):
        assert "--speculate" in CliRunner(env={"COLUMNS": "100"}).invoke(app, [command, "--help"]).output
    result = run(app, ["generate", "x", "--speculate", "draft,other"])
    assert result.exit_code == 1
    assert "speculate: got ('draft', 'other')" in result.output


def test_keys_are_not_shown() -> None:
    config = make_config({"api_key": "k1", "slo_key": ["k2=fast"], "slo_class": ["fast=tpot_ms:9"]}, env={})
    assert changed_from_default(config) == {
        "api_key": "***",
        "slo_key": "***",
        "slo_class": ("fast=tpot_ms:9",),
    }


def test_command_line_wins_over_environment_wins_over_file(tmp_path) -> None:
    file = tmp_path / "options.toml"
    file.write_text("port = 1\nmax_running = 1\nmax_waiting = 1\n")
    env = {"TOKENLOOM_PORT": "2", "TOKENLOOM_MAX_RUNNING": "2"}
    config = probe("--config", str(file), "--port", "3", env=env)
    assert (config.server.port, config.scheduler.max_running, config.scheduler.max_waiting) == (3, 2, 1)


def test_serve_help_fits_two_screens_and_names_every_knob() -> None:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100
    for entry in knobs():
        assert ("MODEL" if entry.name == "model" else entry.flag) in result.output
    words = re.sub(r"\s+", " ", result.output)
    for entry in knobs():
        assert entry.help in words
    assert "TOKENLOOM_" not in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--port", "70000"], "tokenloom: port: got 70000, but it must be 0 to 65535"),
        (["--max-batch-tokens", "0"], "tokenloom: max_batch_tokens: got 0, but it must be at least 1"),
        (["--config", "no-such-file.toml"], "tokenloom: config: got 'no-such-file.toml', but it must be"),
        (
            ["no/such/model"],
            "tokenloom: found no directory at 'no/such/model'; supported: the directory",
        ),
    ],
)
def test_errors_are_one_line(args: list[str], message: str) -> None:
    result = run(app, ["serve", *args])
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [["--port", "x"], ["--policy", "sjf"], ["--no-such-option"]])
def test_malformed_options_are_usage_errors(args: list[str]) -> None:
    result = run(app, ["serve", *args])
    assert result.exit_code == 2
    assert args[0] in result.output


def test_changed_options_are_shown_without_the_key() -> None:
    config = make_config({"api_key": "secret", "port": 1}, env={})
    assert changed_from_default(config) == {"port": 1, "api_key": "***"}
