"""The command `freshrank`: thin, so that everything it does can be called from Python as well."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy import (
    commands_ablate,
    commands_bootstrap,
    commands_chaos,
    commands_compare,
    commands_cycle,
    commands_dead,
    commands_domain,
    commands_erasure,
    commands_experiment,
    commands_explain,
    commands_http,
    commands_inspect,
    commands_label,
    commands_move,
    commands_releases,
    commands_snapshots,
    commands_top,
    commands_topics,
    commands_train,
    commands_watch,
)
from deploy.options import (
    DomainFile,
    Home,
    Json,
    RankerName,
    ServedOn,
    console,
    entity_kind,
    parse_id,
    parse_position,
    position_text,
    quiet,
    settings_for,
    workspace,
)

app = typer.Typer(
    name="freshrank",
    help="Fresh rankings: what a user did a second ago changes what they see next.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for _commands in (
    commands_ablate,
    commands_bootstrap,
    commands_chaos,
    commands_compare,
    commands_cycle,
    commands_dead,
    commands_domain,
    commands_erasure,
    commands_experiment,
    commands_explain,
    commands_http,
    commands_inspect,
    commands_label,
    commands_move,
    commands_releases,
    commands_snapshots,
    commands_top,
    commands_topics,
    commands_train,
    commands_watch,
):
    _commands.register(app)


@app.command()
def up(
    home: Home = None,
    domain: DomainFile = None,
    as_json: Json = False,
) -> None:
    """Start the local stack: Kafka, Triton, worker, reader, server. Ctrl-C stops it; a second start keeps the data.

    It serves the newest release of each ranker in its folder.

    Example: `freshrank up --domain domains/simulator.toml`
    """
    from deploy.stack import Stack

    def on_event(name: str, text: str) -> None:
        console.print(Text.assemble((f"{name:>8}", "dim"), f"  {text}"), soft_wrap=True)

    settings = settings_for(home, domain)
    with Stack(settings, on_event=on_event) as stack:
        endpoints = stack.endpoints()
        if as_json:
            print(json.dumps(endpoints), flush=True)
        else:
            table = Table("part", "endpoint", title=f"freshrank runs in {settings.home} (Ctrl-C stops it)")
            for name, endpoint in endpoints.items():
                table.add_row(name, endpoint)
            console.print(table)
        stack.supervisor.wait_for_signal()


@app.command()
def produce(
    user: Annotated[str, typer.Option(help="User id: a number, or text that is hashed.")] = "",
    item: Annotated[str, typer.Option(help="Item id: a number, or text that is hashed.")] = "",
    action: Annotated[str, typer.Option(help="Name of an action of the domain file.")] = "",
    kind: Annotated[str | None, typer.Option(help="Entity kind; needed where the domain has several.")] = None,
    surface: Annotated[str, typer.Option(help="Name of a surface.")] = "",
    value: Annotated[float, typer.Option(help="Value of the action, such as dwell.")] = float("nan"),
    request_id: Annotated[int, typer.Option(help="The ranking that it answers.")] = 0,
    event_time_ms: Annotated[int | None, typer.Option(help="When the user acted; now where absent.")] = None,
    log: Annotated[Path | None, typer.Option(help="Instead: produce a whole canonical log folder, in its order.")] = None,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Produce one action, or a canonical log, and print the position that the log gave it.

    Example: `freshrank produce --user 42 --item 7 --action click`
    """
    from deploy.processes import kafka_config
    from deploy.stack import running
    from features.domain import load_domain
    from streams.producer import ActionProducer

    settings = running(settings_for(home, domain), needs="kafka")
    product = load_domain(settings.domain)
    producer = ActionProducer(kafka_config(settings), product, settings.topic_actions, base=settings.log_base)
    try:
        if log is not None:
            print(f"{producer.produce_log(log)} records produced")
            return
        for name, text in (("--user", user), ("--item", item), ("--action", action)):
            if not text:
                raise typer.BadParameter("is needed", param_hint=name)
        position = producer.produce(
            user_id=parse_id(user),
            entity_kind=entity_kind(product.entities, kind),
            entity_id=parse_id(item),
            action=action,
            surface=surface or 0,
            value=value,
            request_id=request_id,
            event_time_ms=event_time_ms,
        ).result()
        print(position_text(position))
    finally:
        producer.close()


@app.command()
def rank(
    user: Annotated[str, typer.Option(help="User id: a number, or text that is hashed.")],
    candidates: Annotated[str, typer.Option(help="Item ids, separated by commas.")],
    ranker: RankerName = None,
    kind: Annotated[str | None, typer.Option(help="Entity kind; needed where the domain has several.")] = None,
    after: Annotated[list[str] | None, typer.Option(help="Position that a produce printed: the answer includes it.")] = None,
    identity: Annotated[list[str] | None, typer.Option(help="Further id of the same person; may be repeated.")] = None,
    timeout_ms: Annotated[int, typer.Option(help="Deadline.")] = 2000,
    as_json: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Rank candidates for a user, with the user's newest actions.

    Example: `freshrank rank --user 42 --candidates 7,8,9 --after 5e0f6b8c9d1a2b3c:2:17`
    """
    from deploy.stack import ranking_client, running
    from features.domain import load_domain

    settings = running(settings_for(home, domain), needs="server")
    product = load_domain(settings.domain)
    with ranking_client(settings, timeout_s=timeout_ms / 1000) as client:
        answer = client.rank(
            product.ranker_name(ranker),
            parse_id(user),
            [parse_id(part) for part in candidates.split(",")],
            kinds=entity_kind(product.entities, kind),
            after=[parse_position(text) for text in after or ()],
            identities=[parse_id(text) for text in identity or ()],
        )
    if as_json:
        fields = {"request_id": answer.request_id, "tier": answer.tier, "release_id": answer.release_id, "generations": answer.generations}
        fields |= {"ranked_ids": answer.ids.tolist(), "scores": answer.scores.tolist(), "cold_start": answer.cold_start}
        fields |= {"head_scores": {name: scores.tolist() for name, scores in answer.head_scores.items()}}
        fields |= {"watermark": [position_text(at) for at in answer.watermark], "sequence_age_ms": answer.sequence_age_ms}
        fields |= {"sequence_count": answer.sequence_count, "after_reached": answer.after_reached}
        fields |= {"sequence_source": answer.sequence_source, "state_age_ms": answer.state_age_ms}
        print(json.dumps(fields))
        return
    heads = {name: answer.head_scores[name] for name in product.ranker[product.ranker_name(ranker)].heads if name in answer.head_scores}
    table = Table("rank", "item", "score", *heads)
    for place, (item, score) in enumerate(zip(answer.ids.tolist(), answer.scores.tolist(), strict=True)):
        table.add_row(str(place + 1), str(item), f"{score:.4f}", *(f"{scores[place]:.4f}" for scores in heads.values()))
    Console().print(table)
    age = "no action used" if answer.sequence_age_ms < 0 else f"newest action {answer.sequence_age_ms} ms old"
    late = "" if answer.after_reached else "; NOT YET including the position asked for"
    print(f"{answer.tier} of {answer.release_id}; {answer.sequence_count} actions seen, {age}{late}")


@app.command("import")
def import_command(
    domain: Annotated[Path, typer.Argument(help="Domain file with a [log] part.")],
    data: Annotated[Path, typer.Argument(help="Folder of the published files.")],
    home: Home = None,
) -> None:
    """Import a published log: canonical Parquet logs and feature tables, in bounded memory, from any order of rows.

    Example: `freshrank import domains/kuairand.toml ../shared/data/kuairand-pure`
    """
    from deploy.learn import import_data
    from streams.importer import print_summary

    settings = settings_for(home, domain)
    work = workspace(settings)
    print_summary(import_data(work, data, console), Console())
    print(f"canonical log: {work.log}")


@app.command()
def check(
    domain: Annotated[Path, typer.Argument(help="Domain file with a [log] part.")],
    data: Annotated[Path, typer.Argument(help="Folder of the published files.")],
    as_json: Json = False,
) -> None:
    """Check a published log against its domain file: unknown actions, unseen items, times, duplicates, label rates, with examples.

    Example: `freshrank check domains/kuairand.toml ../shared/data/kuairand-pure`
    """
    from features.domain import load_domain
    from streams.check import check as check_log

    report = check_log(load_domain(domain), data)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        report.print(Console())


@app.command()
def replay(
    archive: Annotated[Path | None, typer.Option(help="Archive folder; Kafka where absent.")] = None,
    write_archive: Annotated[Path | None, typer.Option(help="First copy both topics into this folder.")] = None,
    score_sample: Annotated[int, typer.Option(min=0, help="How many rankings to score again.")] = 100,
    users_share: Annotated[float, typer.Option(min=0, max=1, help="Share of users, by hash.")] = 1.0,
    history: Annotated[str, typer.Option(help="Where the base's history lies now; where it was at the bootstrap if absent.")] = "",
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    served_on: ServedOn = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    home: Home = None,
) -> None:
    """Prove parity: rebuild each logged ranking's inputs from the logs and the release files alone, and compare.

    Exits with 1 on any difference, or where nothing was replayed.

    Example: `freshrank replay --json parity.json`
    """
    from deploy.replay import archive_logs, replay_options
    from deploy.replay import replay as replay_logs

    scored = {"score_sample": score_sample, "seed": seed, "served_on": served_on}
    options = replay_options(settings_for(home), archive, history, users_share=users_share, **scored)
    if write_archive is not None:
        archive_logs(options, write_archive)
    report = replay_logs(options)
    print(report.to_text())
    if json_file is not None:
        json_file.write_text(report.to_json(), "utf-8")
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def demo(
    domain: Annotated[Path | None, typer.Option(help="Domain file of a real log; the simulator where absent.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the published files that the domain file reads.")] = None,
    seconds: Annotated[float, typer.Option(help="Time budget of the training; half of it for the one without the sequence.")] = 80.0,
    loop: Annotated[bool, typer.Option("--loop", help="Instead: serve, label, train on what was served, serve that, compare.")] = False,
    home: Home = None,
) -> None:
    """Train, start the stack, act live, and show what matters. Needs nothing but this checkout.

    With --loop on the simulator: a second model, trained only from what the first one served, beside it on later traffic.

    Example: `freshrank demo` or `freshrank demo --domain domains/kuairand.toml --data ../shared/data/kuairand-pure`
    """
    from deploy.demo import run_demo
    from features.domain import load_domain

    if home is None and loop:
        home = Path(".freshrank-loop")
    if home is None and domain is not None:  # a folder of its own: one home holds one product's state
        home = Path(f".freshrank-{load_domain(domain).name}")
    quiet()
    settings = settings_for(home, domain)
    if loop:
        from deploy.demo_loop import run_loop

        if domain is not None:
            raise typer.BadParameter("runs on the simulator, whose users can act", param_hint="--loop")
        raise typer.Exit(run_loop(settings, seconds / 2, Console()))
    raise typer.Exit(run_demo(settings, domain, data, seconds, Console()))


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="ingest, large (its second half alone), decode, peers, freshness, read, restore, scale, growth, bootstrap, rank, service, "
            "model, train, curve, overload, drain, release, feast or replay."
        ),
    ],
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the model runs; cuda: model alone.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    runs: Annotated[int, typer.Option(help="Repetitions: median and spread come from them.")] = 3,
    plot: Annotated[Path | None, typer.Option(help="growth and curve: draw it into this PNG; beside the JSON where absent.")] = None,
) -> None:
    """Measure: starts what it needs and stops it. Median and spread, with machine and versions.

    Example: `freshrank bench ingest --json ingest.json`
    """
    from deploy.bench import plot as draw
    from deploy.bench import run_bench

    quiet()
    result = run_bench(name if device == "cpu" else f"{name}-{device}", runs, console)
    table = Table("figure", "median", "min", "max", "unit", title=f"{name} on {result['machine']}")
    for figure, row in result["figures"].items():
        table.add_row(figure, *(f"{row[key]:.4g}" for key in ("median", "min", "max")), row["unit"])
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    plot = plot or (json_file.with_suffix(".png") if json_file is not None else None)
    if plot is not None:
        draw(result, plot)


@app.command()
def worker(home: Home = None, domain: DomainFile = None) -> None:
    """Run one worker: Kafka to RocksDB. `freshrank up` does it for you.

    Example: `FRESHRANK_KAFKA_BOOTSTRAP=broker:9092 freshrank worker --domain shop.toml`
    """
    from deploy import processes

    raise typer.Exit(processes.worker(settings_for(home, domain)))


@app.command()
def reader(home: Home = None, domain: DomainFile = None) -> None:
    """Run the gRPC sequence reader beside a worker. `freshrank up` does it for you.

    Example: `freshrank reader --domain shop.toml`
    """
    from deploy import processes

    raise typer.Exit(processes.reader(settings_for(home, domain)))


@app.command()
def server(home: Home = None, domain: DomainFile = None) -> None:
    """Run the ranking server beside a worker. `freshrank up` does it for you.

    Example: `FRESHRANK_TRITON_URL=triton:8001 freshrank server --domain shop.toml`
    """
    from deploy import serving

    raise typer.Exit(serving.server(settings_for(home, domain)))


def expected_errors() -> list[type[Exception]]:
    """Errors that a person can mend: shown as one message. Anything else is a bug and shows where it is."""
    from deploy.kafka_jars import JarsMissingError
    from deploy.stack import StackNotRunningError
    from deploy.supervisor import SupervisorError
    from deploy.triton_server import TritonMissingError
    from features.ports import SequenceCorruptError, SequenceUnavailableError
    from inference.client import RankError
    from streams.errors import StreamError

    found: list[type[Exception]] = [
        StackNotRunningError,
        SupervisorError,
        StreamError,
        SequenceUnavailableError,
        SequenceCorruptError,
        RankError,
        ValueError,
        OSError,
        JarsMissingError,
        TritonMissingError,
    ]
    if "inference.train" in sys.modules:  # only commands that train import torch
        from inference.checkpoints import TrainError

        found.append(TrainError)
    return found


def main() -> None:
    """Runs the command."""
    # OpenMP threads that spin while they wait make everybody else on busy cores wait; it reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, (*expected_errors(),)):
            raise
        console.print(Text.assemble(("error", "red"), f"  {error}"), soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
