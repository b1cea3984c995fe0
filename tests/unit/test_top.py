"""What `freshrank top` makes of the workers' pages, and how it ends."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy import cli, commands_top
from deploy.commands_top import gather
from deploy.top_servers import between, look
from inference.server_metrics import ServerMetrics
from inference.telemetry import Telemetry

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


def scraped(rankings, seconds, shed=0, tier="model"):
    """A server's page after so many rankings of `seconds` each."""
    telemetry = Telemetry()
    for _ in range(rankings):
        telemetry.time("total", seconds)
        telemetry.count("rankings")
        telemetry.count(f"tier_{tier}")
        telemetry.observe("state_age_seconds", 0.015)
    figures = {"in_flight": 3, "shed": shed, "releases_models_in_use": 1, "releases_rankers": 2, "sink_failed": 4}
    return ServerMetrics(telemetry, lambda: figures, dict, lambda: True).exposition()


class Pages(BaseHTTPRequestHandler):
    pages: ClassVar[list[bytes]] = []

    def do_GET(self):
        body = self.pages.pop(0) if len(self.pages) > 1 else self.pages[0]
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server_url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_servers_row_is_what_happened_between_two_looks(server_url):
    Pages.pages = [scraped(1_000, 4.0, shed=50), scraped(1_000, 4.0, shed=50)]
    (before,) = look([server_url]).values()
    telemetry_after = look_after(before, rankings=100, seconds=0.0055, shed=20)
    row = between(before, telemetry_after, 2.0)
    assert (row.rankings_per_s, row.shed_per_s, row.tiers) == (50.0, 10.0, {"embedding": 1.0})
    assert 4 < row.p50_ms < row.p99_ms <= 6  # the four-second rankings were before
    assert (row.in_flight, row.models, row.log_dropped, row.ready) == (3, "1 of 2", 4, True)
    assert between(telemetry_after, before, 1.0).rankings_per_s == 1_000  # it has started anew: all of it is new
    assert between(before, None, 1.0) is None
    assert between(before, before, 1.0).p99_ms is None


def look_after(before, rankings, seconds, shed):
    """`before`, and what a server does then."""
    Pages.pages = [scraped(rankings, seconds, shed, tier="embedding")]
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        (more,) = look([f"http://127.0.0.1:{server.server_address[1]}"]).values()
        server.shutdown()
        thread.join()
    gauges = ("ready", "in_flight", "models_in_use", "rankers", "log_failed_total")
    return {key: value if key[0] in gauges else value + before[key] for key, value in more.items()}


def test_top_shows_servers_beside_workers_or_alone(server_url):
    Pages.pages = [scraped(0, 0), scraped(500, 0.0055)]
    result = CliRunner().invoke(cli.app, ["top", "--once", "--json", "--every-s", "0.1", "--server-url", server_url])
    assert result.exit_code == 0, result.output
    row = json.loads(result.output)["servers"][server_url]
    assert row["rankings_per_s"] > 100
    assert row["tiers"] == {"model": 1.0}
    assert 10 < row["state_age_p99_ms"] <= 20
    result = CliRunner().invoke(
        cli.app, ["top", "--once", "--every-s", "0.1", "--server-url", "http://127.0.0.1:9"], env={"COLUMNS": "200"}
    )
    assert (result.exit_code, "does not answer" in result.output) == (1, True)
