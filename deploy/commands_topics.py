"""`freshrank topics`: the topics of an outside Kafka, as the settings say them."""

from typing import Annotated

import typer

from deploy.options import Home, settings_for


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("topics")(topics_command)


def topics_command(
    wait_s: Annotated[float, typer.Option(min=0, help="How long to wait for a broker that is starting, seconds.")] = 60.0,
    home: Home = None,
) -> None:
    """Create the topics of freshrank where they are not there yet; what is there stays as it is. The local stack does it by itself.

    Example: `FRESHRANK_KAFKA_BOOTSTRAP=broker:9092 freshrank topics`
    """
    from deploy.processes import kafka_config, topics
    from deploy.stack import running
    from streams.kafka import ensure_topics

    settings = running(settings_for(home), needs="kafka")
    identity = ensure_topics(
        kafka_config(settings),
        topics(settings),
        partition_count=settings.partitions,
        replication_factor=settings.replication_factor,
        retention_ms=settings.retention_ms,
        timeout_s=wait_s,
    )
    print(f"{settings.topic_actions}: {identity.partition_count} partitions, log epoch {identity.epoch:016x}")
