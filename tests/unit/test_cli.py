"""The command line without servers: help, ids, positions, errors that a person can mend."""

import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from deploy import cli, options
from deploy.paper_size import paper_size
from deploy.settings import SettingsError, load_settings
from deploy.stack import StackNotRunningError, running
from features.domain import parse_domain
from features.erasures import Erasure
from features.ids import string_id
from features.ports import Position
from streams.erasure_audit import AUDIT, PLACES, Audit

COMMANDS = ("up", "demo", "produce", "rank", "import", "check", "train", "publish", "evaluate", "replay", "erase", "bench", "worker")
COMMANDS += ("reader", "server", "bootstrap", "dead", "inspect", "top", "http", "topics", "watch", "experiment", "compare", "explain")
COMMANDS += ("label", "cycle", "ablate", "releases", "rollback")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output


def test_ids_are_numbers_or_hashed_text():
    assert [options.parse_id(text) for text in ("42", " 42 ", "ada", str(2**64 - 1))] == [42, 42, string_id("ada"), 2**64 - 1]
    assert options.parse_id(str(2**64)) == string_id(str(2**64))
    with pytest.raises(typer.BadParameter, match="empty"):
        options.parse_id(" ")


def test_positions_are_read_as_they_are_printed():
    position = Position(2**63 + 5, 3, 17)
    assert options.parse_position(options.position_text(position)) == position
    assert options.parse_position("3:17") == Position(0, 3, 17)
    for wrong in ("17", "x:1:2", ""):
        with pytest.raises(typer.BadParameter, match="EPOCH:PARTITION:OFFSET"):
            options.parse_position(wrong)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["freshrank", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr()


def test_a_missing_stack_says_which_part_and_what_to_do(tmp_path, monkeypatch, capsys):
    with pytest.raises(StackNotRunningError, match=r"server: none runs in .*freshrank up.*server_address"):
        running(load_settings(home=tmp_path), needs="server")
    code, output = run(monkeypatch, capsys, "produce", "--user", "1", "--item", "2", "--action", "click", "--home", str(tmp_path))
    assert code == 1
    assert "kafka: none runs in" in output.err


def test_publish_before_train_and_markup_in_a_message_are_one_line(tmp_path, monkeypatch, capsys):
    code, output = run(monkeypatch, capsys, "publish", "--home", str(tmp_path / "[/x]"))
    assert code == 1
    assert "train into" in output.err
    assert "[/x]" in output.err
    assert "Traceback" not in output.err


def test_an_unknown_variable_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("FRESHRANK_KAFKA_BOOTSTRP", "x:1")
    with pytest.raises(SettingsError, match="FRESHRANK_KAFKA_BOOTSTRP"):
        load_settings()


def test_benchmarks_rank_with_a_model_of_the_papers_size():
    text = paper_size((cli.Path(__file__).parents[2] / "domains" / "simulator.toml").read_text("utf-8"))
    home = parse_domain(text, source="bench").ranker["home"]
    assert (home.sequence_length, home.model.first_k, home.model.cross_rank, home.model.layers) == (100, 10, 0, 2)


def test_an_erasure_that_is_overdue_is_red_and_the_exit_code_says_it(tmp_path, monkeypatch, capsys):
    erasure = Erasure(42, 7, 1, 0, 3, 1_700_000_000_000, "ticket 17")
    audit = Audit(tmp_path / AUDIT)
    audit.asked([erasure], 10**15, 0)
    (entry,) = audit.of_user(42)
    for place in PLACES:
        audit.set(entry, place, "done", "", 1_700_000_000_001)
    audit.write()
    home = ("--home", str(tmp_path))
    code, output = run(monkeypatch, capsys, "erase-job", "status", "--user", "42", *home)
    assert (code, output.out.count("done")) == (0, len(PLACES))
    assert "ticket" in output.out
    audit.asked([replace(erasure, event_id=8, offset=4)], 1_000, 0)
    code, output = run(monkeypatch, capsys, "erase-job", "status", *home)
    assert (code, output.out.count("overdue")) == (1, len(PLACES))
    code, output = run(monkeypatch, capsys, "erase-job", "status", "--json", *home)
    said = json.loads(output.out)
    assert (code, [len(one["overdue"]) for one in said]) == (1, [0, len(PLACES)])
    assert said[0]["user_id"] == f"{42:016x}"


def test_the_erasure_job_without_a_broker_does_the_files(tmp_path, monkeypatch, capsys):
    code, output = run(monkeypatch, capsys, "erase-job", "run", "--offline", "--home", str(tmp_path), "--json")
    assert (code, json.loads(output.out)["new"]) == (0, 0)
    code, output = run(monkeypatch, capsys, "erase-job", "run", "--home", str(tmp_path))
    assert code == 1
    assert "kafka: none runs in" in output.err
