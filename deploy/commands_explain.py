"""`freshrank explain`: why a user saw what they saw."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deploy.options import DomainFile, Home, RankerName, ServedOn, entity_kind, parse_id, settings_for

if TYPE_CHECKING:
    from deploy.settings import Settings
    from features.domain import Domain
    from protos.v1.ranking_pb2 import Explanation

_TIMEOUT_S = 10.0


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(explain)


def explain(
    request_id: Annotated[int | None, typer.Option(help="A logged ranking: rebuilt from the logs as it was served.")] = None,
    shadow: Annotated[str, typer.Option(help="With --request-id: what this release scored in the ranking's shadow.")] = "",
    user: Annotated[str | None, typer.Option(help="Instead: what the server would answer this user now.")] = None,
    candidates: Annotated[str, typer.Option(help="With --user: item ids, separated by commas.")] = "",
    kind: Annotated[str | None, typer.Option(help="With --user: entity kind; needed where the domain has several.")] = None,
    ranker: RankerName = None,
    archive: Annotated[Path | None, typer.Option(help="Archive folder of both logs; Kafka where absent.")] = None,
    history: Annotated[str, typer.Option(help="Where the base's history lies now; where it was at the bootstrap if absent.")] = "",
    served_on: ServedOn = "auto",
    html: Annotated[Path | None, typer.Option(help="Also write the page to this HTML file, which needs nothing else.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many candidates are shown.")] = 20,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Explain a ranking: its scores by head, the sequence and features used, and the effect of leaving out each recent action.

    Example: `freshrank explain --request-id 1234 --html why.html`
    """
    from deploy.explain_page import html_page, page
    from deploy.explaining import explain_logged
    from deploy.replay import replay_options

    settings = settings_for(home, domain)
    if (request_id is None) == (user is None):
        raise typer.BadParameter("give either --request-id, or --user with --candidates", param_hint="--request-id")
    product: Domain
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    if request_id is not None:
        explained = explain_logged(replay_options(settings, archive, history, served_on=served_on), request_id, shadow_release=shadow)
        product, found = explained.domain, explained.explanation
        notes, warnings = explained.notes, explained.warnings
    else:
        product, found = _ask(settings, str(user), candidates, kind, ranker)
    parts = page(product, found, notes=notes, warnings=warnings, candidates_max=top)
    for part in parts:
        Console().print(part)
    if html is not None:
        html.write_text(html_page(parts, f"request {found.response.request_id}"), "utf-8")


def _ask(settings: "Settings", user: str, candidates: str, kind: str | None, ranker: str | None) -> "tuple[Domain, Explanation]":
    from deploy.stack import ranking_client, running
    from features.domain import load_domain
    from inference.client import rank_request

    if not candidates:
        raise typer.BadParameter("is needed with --user: item ids, separated by commas", param_hint="--candidates")
    settings = running(settings, needs="server")
    product = load_domain(settings.domain)
    ids = [parse_id(part) for part in candidates.split(",")]
    request = rank_request(product.ranker_name(ranker), parse_id(user), ids, kinds=entity_kind(product.entities, kind))
    with ranking_client(settings, timeout_s=_TIMEOUT_S) as client:
        return product, client.explain(request)
