"""`freshrank dead`: the records that could not be folded, read by a person and sent again."""

import json
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy.options import DomainFile, Home, Json, console, parse_id, position_text, settings_for
from deploy.wording import as_json, iso, now_ms, parse_time, time_text, value_lines

Reasons = Annotated[list[str] | None, typer.Option("--reason", help="Only this kind of reason, as `list` counts them; may be repeated.")]
Since = Annotated[str | None, typer.Option(help="Only records that the log took at or after this: 2026-07-01T12:00:00Z, or an age: 2h.")]
Until = Annotated[str | None, typer.Option(help="Only records that the log took before this; written like --since.")]
User = Annotated[str | None, typer.Option(help="Only records of this user, by value or key.")]
PartitionNumber = Annotated[int | None, typer.Option("--partition", min=0, help="Only records of this partition of the actions topic.")]
Places = Annotated[list[str] | None, typer.Argument(help="PARTITION:OFFSET of source records, as `list` prints them.", show_default=False)]

_COLUMNS_MAX = 60


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    dead = typer.Typer(
        help="Records that could not be folded: list them, read one, send them again.\n\nExample: `freshrank dead list --since 2h`",
        no_args_is_help=True,
    )
    dead.command("list")(list_letters)
    dead.command("show")(show_letter)
    dead.command("redrive")(redrive_letters)
    app.add_typer(dead, name="dead")


def list_letters(
    reason: Reasons = None,
    since: Since = None,
    until: Until = None,
    user: User = None,
    partition: PartitionNumber = None,
    limit: Annotated[int, typer.Option(min=0, help="How many of the newest are shown; all are counted.")] = 50,
    as_json_lines: Json = False,
    home: Home = None,
) -> None:
    """Count dead letters by reason and show the newest. A letter that was buried twice counts once.

    Example: `freshrank dead list --reason partition --since 2h`
    """
    from streams.dead_letters import Letter, read_letters

    now = now_ms()
    kafka, topics, _ = _parts(home, needs_domain=False)
    waiting: Counter[str] = Counter()
    redriven: Counter[str] = Counter()
    newest: deque[Letter] = deque(maxlen=limit)
    for letter in read_letters(kafka, topics.dead_letters, _selection(reason, since, until, user, partition, None, now)):
        (redriven if letter.redriven else waiting)[letter.kind] += 1
        newest.append(letter)
    if as_json_lines:
        counts = {kind: {"waiting": waiting[kind], "redriven": redriven[kind]} for kind in sorted({*waiting, *redriven})}
        print(
            json.dumps({"counts": counts, "letters": [{**asdict(letter), "user_id": letter.user_id} for letter in newest]}, default=as_json)
        )
        return
    Console().print(counts_table(waiting, redriven))
    if newest:
        Console().print(letters_table(newest, now))
        hidden = waiting.total() + redriven.total() - len(newest)
        if hidden:
            print(f"{hidden} older ones are not shown: narrow the selection, or raise --limit")


def show_letter(
    place: Annotated[str, typer.Argument(help="PARTITION:OFFSET of the source record, as `list` prints it.")],
    as_json_lines: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Show one dead letter: reason, source position, times, key, and the value as far as it can be read.

    Example: `freshrank dead show 2:1718`
    """
    from streams.dead_letters import read_letters

    now = now_ms()
    kafka, topics, product = _parts(home, domain)
    selection = _selection(None, None, None, None, None, [place], now)
    letters = list(read_letters(kafka, topics.dead_letters, selection))
    if not letters:
        raise typer.BadParameter(f"{place} is no dead letter of {topics.dead_letters}: `freshrank dead list` prints them")
    for letter in letters:  # more than one only where the topic was made anew: the log epoch tells them apart
        if as_json_lines:
            value = dict(value_lines(product, letter.value, now))
            print(json.dumps({**asdict(letter), "user_id": letter.user_id, "read": value}, default=as_json))
            continue
        table = Table(show_header=False, title=f"dead letter {place}", title_justify="left")
        for name, text in _details(letter, now) + value_lines(product, letter.value, now):
            table.add_row(name, text)
        Console().print(table)


def redrive_letters(
    places: Places = None,
    reason: Reasons = None,
    since: Since = None,
    until: Until = None,
    user: User = None,
    partition: PartitionNumber = None,
    everything: Annotated[bool, typer.Option("--all", help="All letters; needed where nothing else selects.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many are sent; run it again for the rest.")] = 1_000,
    rekey: Annotated[bool, typer.Option("--rekey", help="Replace a wrong key by the one of the value's user id.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also letters that were re-driven before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent; send nothing.")] = False,
    as_json_lines: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Send dead letters to the actions topic again, each with its original append time and in the partition of its key.

    A letter that today's worker would reject again is left alone and counted. What was sent is marked, so another run passes it over.

    Example: `freshrank dead redrive --reason partition --since 2d --dry-run`
    """
    from streams.dead_letters import Redrive, read_letters

    if not everything and not any((places, reason, since, until, user)) and partition is None:
        raise typer.BadParameter("select letters (PARTITION:OFFSET, --reason, --since, --until, --user, --partition), or give --all")
    kafka, topics, product = _parts(home, domain)
    selection = _selection(reason, since, until, user, partition, places, now_ms())
    letters = read_letters(kafka, topics.dead_letters, selection)
    done = Redrive(kafka, topics, product).run(letters, limit=limit, rekey=rekey, again=again, dry_run=dry_run)
    if as_json_lines:
        sent = [
            {"place": f"{letter.partition}:{letter.offset}", "position": position_text(position) if position else None}
            for letter, position in done.sent
        ]
        fields = {"dry_run": dry_run, "sent": sent, "erasures": done.erasures, "left_over": done.left_over, "refused": dict(done.refused)}
        print(json.dumps(fields))
        return
    print(f"{len(done.sent)} letters {'would be' if dry_run else 'were'} sent to {topics.actions}")
    if done.erasures:
        print(f"{done.erasures} of them are erasures: they also drop what these users did since")
    for kind, count in done.refused.most_common():
        print(
            f"{count} left alone: {'re-driven before (--again sends them once more)' if kind == 'redriven' else f'still rejected, {kind}'}"
        )
    if done.left_over:
        print(f"{done.left_over} more wait: run it again, or raise --limit")


def counts_table(waiting: Counter[str], redriven: Counter[str]) -> Table:
    """Letters by kind of reason, most frequent first."""
    table = Table("reason", "waiting", "re-driven", title="dead letters by reason", title_justify="left")
    for kind, _ in (waiting + redriven).most_common():
        table.add_row(kind, str(waiting[kind]), str(redriven[kind]))
    if not waiting and not redriven:
        table.add_row("none", "0", "0")
    return table


def letters_table(letters: Iterable[Any], now: int) -> Table:
    """One line a letter, in the order given."""
    table = Table("source", "log took it", "user", "reason", "re-driven", title="newest", title_justify="left")
    for letter in letters:
        user = letter.user_id
        reason = letter.reason if len(letter.reason) <= _COLUMNS_MAX else letter.reason[: _COLUMNS_MAX - 3] + "..."
        cells = (time_text(letter.source_time_ms, now), "-" if user is None else str(user), reason, "yes" if letter.redriven else "")
        table.add_row(f"{letter.partition}:{letter.offset}", *cells)
    return table


def _details(letter: Any, now: int) -> list[tuple[str, str]]:
    key = letter.key
    return [
        ("reason", letter.reason),
        ("source", f"{letter.topic} partition {letter.partition} offset {letter.offset}, log {letter.log_epoch:016x}"),
        ("append time", time_text(letter.append_time_ms, now) if letter.append_time_ms > 0 else "not readable"),
        ("broker's time", time_text(letter.broker_time_ms, now)),
        ("buried", iso(letter.buried_ms)),
        ("re-driven", letter.redriven.partition(": ")[2] or "no"),
        ("key", "none" if key is None else f"{key.decode()!r}" if key.isascii() else f"{key.hex()} (hex)"),
        ("user", "not readable" if letter.user_id is None else str(letter.user_id)),
    ]


def _parts(home: Any, domain: Any = None, *, needs_domain: bool = True) -> tuple[Any, Any, Any]:
    from deploy.options import quiet
    from deploy.processes import kafka_config, topics
    from deploy.stack import running
    from features.domain import load_domain

    quiet()
    settings = running(settings_for(home, domain), needs="kafka")
    console.print(f"reading {settings.topic_dead_letters} at {settings.kafka_bootstrap}", style="dim", soft_wrap=True)
    return kafka_config(settings), topics(settings), load_domain(settings.domain) if needs_domain else None


def _selection(
    reason: list[str] | None,
    since: str | None,
    until: str | None,
    user: str | None,
    partition: int | None,
    places: list[str] | None,
    now: int,
) -> Any:
    from streams.dead_letters import Selection

    return Selection(
        kinds=tuple(reason or ()),
        since_ms=None if since is None else parse_time(since, now, "--since"),
        until_ms=None if until is None else parse_time(until, now, "--until"),
        user_id=None if user is None else parse_id(user),
        partition=partition,
        places=tuple(map(_place, places or ())),
    )


def _place(text: str) -> tuple[int, int]:
    partition, colon, offset = text.rpartition(":")
    if not (colon and partition.isdecimal() and offset.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not PARTITION:OFFSET, as `freshrank dead list` prints it")
    return int(partition), int(offset)
