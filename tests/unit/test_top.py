"""What `freshrank top` makes of the workers' pages, and how it ends."""

import json

from rich.console import Console
from typer.testing import CliRunner

from deploy import cli, commands_top
from deploy.commands_top import gather

NOW = 1_780_000_000_000


def state(lag=0, lag_s=0.0, role="owner", offset=41) -> dict:
    return {"lag": lag, "lag_s": lag_s, "role": role, "applied_offset": offset}


def page(partitions, *, healthy=True, stalled=(), dead=None, assigned=True, caught_up=True) -> dict:
    flags = {"healthy": healthy, "live": healthy, "ready": True, "assigned": assigned, "caught_up": caught_up}
    return {**flags, "stalled": list(stalled), "partitions": partitions, "dead_letters": dead or {}}


def window(start_s, events_per_s, dead_letters=0, visible_ms_max=12) -> dict:
    return {"start_s": start_s, "events_per_s": events_per_s, "dead_letters": dead_letters, "visible_ms_max": visible_ms_max}


PAGES = {
    "http://a:1": (
        page({"0": state(), "1": state(role="standby", offset=7)}, dead={"key": 2}) | {"snapshots": {"0": {"offset": 30, "age_s": 90}}},
        {
            "window_s": 10,
            "held": True,
            "partitions": {
                "0": [window(NOW / 1000 - 900, 1.0), window(NOW / 1000 - 8, 250.5, dead_letters=20)],
                "1": [window(NOW / 1000 - 900, 9.0)],
            },
        },
    ),
    "http://b:2": (
        page({"1": state(5, 6.5, offset=99)}, healthy=False, stalled=["1"], dead={"key": 1, "value": 3}),
        {"window_s": 10, "held": False, "partitions": {}},
    ),
    "http://c:3": None,
}


def frame(monkeypatch):
    monkeypatch.setattr(commands_top, "_pages", PAGES.get)
    monkeypatch.setattr(commands_top, "now_ms", lambda: NOW)
    return gather(list(PAGES))


def test_pages_of_all_workers_are_one_frame(monkeypatch):
    found = frame(monkeypatch)
    assert found.workers_up == 2
    assert found.dead_letters == {"key": 3, "value": 3}
    first, second = found.partitions[0], found.partitions[1]
    assert (first["events_per_s"], first["dead_letters_per_s"], first["visible_ms_max"], first["snapshot_age_s"]) == (250.5, 2.0, 12, 90)
    # The owner's row counts, not the standby's; its last window is long over, so nothing happens there now.
    assert (second["worker"], second["applied_offset"], second["stalled"]) == ("b:2", 99, True)
    assert (second["events_per_s"], second["visible_ms_max"], second["snapshot_age_s"]) == (0.0, None, None)
    assert json.loads(json.dumps(found.as_json()))["workers"]["http://c:3"] is None


def test_a_frame_is_readable(monkeypatch):
    console = Console(width=160)
    with console.capture() as captured:
        console.print(frame(monkeypatch).render())
    for expected in (
        "2 of 3 workers, 250.5 events/s",
        "12 ms",
        "6.5 s",
        "1 m 30 s",
        "http://a:1: healthy",
        "STALLED: partitions 1",
        "http://c:3: does not answer",
        "dead letters: key 3, value 3",
    ):
        assert expected in captured.get(), expected


def test_ctrl_c_ends_it_cleanly(monkeypatch):
    monkeypatch.setattr(commands_top, "_pages", PAGES.get)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(commands_top.time, "sleep", sleep)
    for arguments in (["--json"], []):
        slept.clear()
        result = CliRunner().invoke(cli.app, ["top", "--url", "http://a:1", "--every-s", "0.5", *arguments])
        assert result.exit_code == 0, result.output
        assert slept == [0.5] * 3
    assert "1 of 1 workers" in result.output


def test_without_a_worker_it_says_what_to_do(tmp_path):
    result = CliRunner().invoke(cli.app, ["top", "--once", "--home", str(tmp_path)])
    assert result.exit_code == 1
    assert "freshrank up" in str(result.exception)
