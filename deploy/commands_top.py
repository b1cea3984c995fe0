"""`freshrank top`: what the workers and the ranking servers do, live, from their web pages."""

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urljoin

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.options import Home, Json, settings_for
from deploy.top_servers import Look, ServerRow, as_json, between, look
from deploy.top_servers import table as server_table
from deploy.wording import duration, iso, now_ms

_TIMEOUT_S = 2.0


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("top")(top)


def top(
    url: Annotated[list[str] | None, typer.Option(help="Web address of a worker; repeat it for several. The home's where absent.")] = None,
    server_url: Annotated[
        list[str] | None, typer.Option(help="Web address of a ranking server; repeat it for several. The home's where absent.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds between frames.")] = 1.0,
    as_json: Json = False,
    home: Home = None,
) -> None:
    """Watch workers (rate, lag, freshness, dead letters, snapshot age by partition) and ranking servers (rate, latency, tiers, shed,
    age of the state). Ctrl-C ends it.

    Example: `freshrank top` or `freshrank top --once --json --url http://worker-0:6066`
    """
    from deploy.stack import server_pages, worker_pages

    urls = url or ([] if server_url else worker_pages(settings_for(home)))
    servers = Servers(server_url or ([] if url else server_pages(settings_for(home))))
    if once:
        servers.look()
        if servers.urls:
            time.sleep(every_s)  # a rate needs two looks
        frame = gather(urls, servers)
        print(json.dumps(frame.as_json())) if as_json else Console().print(frame.render())
        raise typer.Exit(0 if frame.all_up else 1)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:  # the last frame stays on the terminal
        live = None if as_json else stack.enter_context(Live(console=Console(), auto_refresh=False))
        while True:
            frame = gather(urls, servers)
            live.update(frame.render(), refresh=True) if live is not None else print(json.dumps(frame.as_json()), flush=True)
            time.sleep(every_s)


class Servers:
    """The ranking servers at some addresses, and when they were last looked at."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self._before: dict[str, Look | None] = {}
        self._before_s = time.monotonic()

    def look(self) -> dict[str, ServerRow | None]:
        """What each did since the last look; since its start the first time, where rates mean nothing."""
        if not self.urls:
            return {}
        after, now_s = look(self.urls), time.monotonic()
        seconds = max(now_s - self._before_s, 1e-3)
        rows = {url: between(self._before.get(url), after[url], seconds) for url in self.urls}
        self._before, self._before_s = after, now_s
        return rows


@dataclass(frozen=True)
class Frame:
    """One look at everything. workers: by address, None where it did not answer; partitions: rows by number, the owner's; servers as
    workers.
    """

    time_ms: int
    workers: dict[str, dict[str, Any] | None]
    partitions: dict[int, dict[str, Any]]
    dead_letters: dict[str, int]
    servers: dict[str, ServerRow | None] = field(default_factory=dict)

    @property
    def all_up(self) -> bool:
        """Whether a worker answered, where there are workers, and a server, where there are servers."""
        return (not self.workers or self.workers_up > 0) and (not self.servers or any(self.servers.values()))

    @property
    def workers_up(self) -> int:
        """How many answered."""
        return sum(health is not None for health in self.workers.values())

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        keys = ("healthy", "live", "ready", "stalled")
        workers = {url: health and {key: health.get(key) for key in keys} for url, health in self.workers.items()}
        found = {"time": iso(self.time_ms), "workers": workers, "partitions": self.partitions, "dead_letters": self.dead_letters}
        return found | {"servers": as_json(self.servers)}

    def render(self) -> Group:
        """For a terminal."""
        table = Table(
            "partition", "events/s", "dead/s", "lag", "lag age", "visible, longest", "offset", "snapshot", "worker", title=self._title()
        )
        table.title_justify = "left"
        for number, row in sorted(self.partitions.items()):
            style = "red" if row["stalled"] else "yellow" if row["lag_s"] > 5 else ""
            cells = [
                f"{row['events_per_s']:.1f}" if row["events_per_s"] is not None else "-",
                f"{row['dead_letters_per_s']:.1f}" if row["dead_letters_per_s"] is not None else "-",
                str(row["lag"]),
                duration(row["lag_s"]),
                "-" if row["visible_ms_max"] is None else duration(row["visible_ms_max"] / 1000),
                str(row["applied_offset"]),
                "-" if row["snapshot_age_s"] is None else duration(row["snapshot_age_s"]),
                row["worker"] + (" (standby)" if row["role"] == "standby" else ""),
            ]
            table.add_row(str(number), *cells, style=style)
        lines = [
            Text(f"{url}: {_state(health)}", style="" if health and health["healthy"] else "red") for url, health in self.workers.items()
        ]
        dead = ", ".join(f"{kind} {count}" for kind, count in self.dead_letters.items()) or "none"
        shown: list[Table | Text] = [table, *lines, Text(f"dead letters: {dead}")] if self.workers else []
        return Group(*shown, *([server_table(self.servers)] if self.servers else []))

    def _title(self) -> str:
        rate = sum(row["events_per_s"] or 0 for row in self.partitions.values())
        return f"{iso(self.time_ms)}  {self.workers_up} of {len(self.workers)} workers, {rate:.1f} events/s"


def gather(urls: Sequence[str], servers: Servers | None = None) -> Frame:
    """Asks every worker's pages at once; one that does not answer is shown as such."""
    with ThreadPoolExecutor(max(len(urls), 1)) as pool:
        pages = dict(zip(urls, pool.map(_pages, urls), strict=True))
    rates: dict[int, dict[str, Any]] = {}
    window_s = 1
    for _, held in filter(None, pages.values()):
        window_s = held["window_s"]
        rates |= {int(number): windows[-1] for number, windows in held["partitions"].items() if windows}
    now = now_ms()
    partitions: dict[int, dict[str, Any]] = {}
    dead: Counter[str] = Counter()
    for url, (health, _) in ((url, found) for url, found in pages.items() if found):
        dead.update(health.get("dead_letters", {}))
        for text, state in health["partitions"].items():
            number = int(text)
            if number in partitions and state.get("role") == "standby":
                continue  # the owner's row is the one that counts
            rate = rates.get(number)
            partitions[number] = {
                "events_per_s": None,
                "dead_letters_per_s": None,
                "visible_ms_max": None,
                **(_recent(rate, window_s, now) if rate else {}),
                "lag": state["lag"],
                "lag_s": state["lag_s"],
                "applied_offset": state["applied_offset"],
                "snapshot_age_s": health.get("snapshots", {}).get(text, {}).get("age_s"),
                "stalled": text in health["stalled"],
                "role": state.get("role", "owner"),
                "worker": url.removeprefix("http://").rstrip("/"),
            }
    workers = {url: found[0] if found else None for url, found in pages.items()}
    looked = servers.look() if servers is not None else {}
    return Frame(now, workers, dict(sorted(partitions.items())), dict(sorted(dead.items())), looked)


def _recent(rate: dict[str, Any], window_s: int, now: int) -> dict[str, Any]:
    """The newest window of a partition; nothing happened where it is over for long."""
    if now / 1000 > rate["start_s"] + 2 * window_s:
        return {"events_per_s": 0.0, "dead_letters_per_s": 0.0}
    late_ms = rate["visible_ms_max"]
    return {
        "events_per_s": rate["events_per_s"],
        "dead_letters_per_s": round(rate["dead_letters"] / window_s, 3),
        "visible_ms_max": late_ms if late_ms >= 0 else None,
    }


def _pages(url: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    try:
        return _json(urljoin(url, "/health/")), _json(urljoin(url, "/rates/"))
    except (OSError, ValueError):
        return None


def _json(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:  # 503 carries a page too: that is what it wants to say
        body = error.read()
    found: dict[str, Any] = json.loads(body)
    return found


def _state(health: dict[str, Any] | None) -> str:
    if health is None:
        return "does not answer"
    if health["stalled"]:
        return f"STALLED: partitions {', '.join(health['stalled'])} have lag and make no progress"
    if not health["healthy"]:
        return "not healthy" if health["assigned"] else "no partition assigned yet"
    return "healthy" if health["caught_up"] else "catching up"
