"""`freshrank http`: the JSON/HTTP door as a process."""

import typer

from deploy.options import DomainFile, Home, settings_for


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("http")(http)


def http(home: Home = None, domain: DomainFile = None) -> None:
    """Rank, explain and produce over HTTP with JSON, for programs without gRPC; /docs is its page. Ctrl-C ends it.

    It needs a running stack, or settings that name Kafka and server_address; `freshrank up` does not start it.

    Example: `FRESHRANK_HTTP_PORT=8080 freshrank http`
    """
    from deploy.http_door import http_door
    from deploy.stack import running

    settings = running(running(settings_for(home, domain), needs="kafka"), needs="server")
    raise typer.Exit(http_door(settings))
