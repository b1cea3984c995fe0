"""`freshrank watch`: follows one user's sequence, and says what changes as a person would."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.options import DomainFile, Home, Json, parse_id, position_text, settings_for
from deploy.wording import as_json, duration, event_fields, now_ms

if TYPE_CHECKING:
    from features.domain import Domain
    from features.ports import Reading
    from features.sequence import Events


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(watch)


def watch(
    user: Annotated[str, typer.Option(help="User id: a number, or text that is hashed.")],
    sequence: Annotated[str | None, typer.Option(help="A [sequence.NAME] of the domain file; the first one where absent.")] = None,
    address: Annotated[str, typer.Option(help="host:port of the sequence reader; the local stack's where absent.")] = "",
    changes: Annotated[int | None, typer.Option(min=0, help="End after so many changes.", show_default="never")] = None,
    as_json_lines: Json = False,
    home: Home = None,
    domain: DomainFile = None,
) -> None:
    """Follow a user's sequence: what there is now, then each change with its position, until Ctrl-C or until the reader stops.

    Example: `freshrank watch --user 42`
    """
    from deploy.stack import StackNotRunningError, endpoint
    from features.domain import load_domain
    from streams.remote_reader import RemoteReader

    settings = settings_for(home, domain)
    product = load_domain(settings.domain)
    name = sequence or next(iter(product.sequence))
    if name not in product.sequence:
        raise typer.BadParameter(f"allowed: {', '.join(product.sequence)}", param_hint="--sequence")
    address = address or endpoint(settings.home, "reader")
    if not address:
        raise StackNotRunningError(f"reader: none runs in {settings.home}; start the stack with `freshrank up`, or name one with --address")
    token = settings.server_token.get_secret_value() if settings.server_token else None
    reader = RemoteReader(address, product, root_certificate=settings.tls_authority, token=token)
    before: Reading | None = None
    try:
        for count, reading in enumerate(reader.watch(name, parse_id(user))):
            found = _change(product, before, reading)
            print(json.dumps(found, default=as_json) if as_json_lines else _text(found), flush=True)
            before = reading
            if count == changes:
                return
    except KeyboardInterrupt:
        return
    finally:
        reader.close()
    typer.echo("the reader has stopped", err=True)


def _change(product: "Domain", before: "Reading | None", now: "Reading") -> dict[str, Any]:
    """What is new, oldest first, and how many events have left."""
    had, has = {event.tobytes() for event in _events(before)}, _events(now)
    new = [event for event in has if event.tobytes() not in had]
    return {
        "user_id": now.user_id,
        "watermark": position_text(now.watermark),
        "state_age_ms": now.state_age_ms,
        "events": len(has),
        "new": [event_fields(product, event, now_ms()) for event in new],
        "gone": len(had) + len(new) - len(has),
        "first": before is None,
    }


def _events(reading: "Reading | None") -> "Events":
    import numpy as np

    from features.actions import EVENT_DTYPE
    from features.sequence import decode_row

    return decode_row(reading.row, reading.user_id).events if reading is not None and reading.row else np.zeros(0, EVENT_DTYPE)


def _text(found: dict[str, Any]) -> str:
    age = "age not known" if found["state_age_ms"] < 0 else f"{duration(found['state_age_ms'] / 1000)} old"
    head = f"{found['watermark']}  {found['events']} events, state {age}"
    if found["gone"]:
        head += f"; {found['gone']} gone"
    lines = ["  + " + "  ".join(text for name, text in event.items() if text != "-" and name != "event id") for event in found["new"]]
    return "\n".join([head, *lines])
