"""What is announced about rankers: said by commands, followed by servers.

Keys of the announcements topic: "release/RANKER" (ReleaseAnnouncement), "formula/RANKER" (FormulaAnnouncement), "experiment/RANKER"
(Experiment).
"""

import threading
from collections.abc import Mapping

from deploy.experiments import EXPERIMENT_KEY, experiment_of
from deploy.processes import MOVE_KEY, RELEASE_KEY, kafka_config
from deploy.settings import Settings
from features.lineage import Predecessor
from inference.announced import Announced
from inference.server import RankingServer
from protos.v1.ranking_pb2 import FormulaAnnouncement, ReleaseAnnouncement
from streams.broadcast import Announcements, announce

FORMULA_KEY = "formula/"


def announced(settings: Settings) -> dict[str, bytes]:
    """Everything that is announced now, by key. Raises KafkaUnavailableError, TopicError."""
    topic = Announcements(kafka_config(settings), settings.topic_announcements)
    try:
        return topic.values()
    finally:
        topic.close()


def releases_of(values: Mapping[str, bytes]) -> dict[str, Announced]:
    """The announced releases among `values`, by ranker."""
    keys = [key for key in values if key.startswith(RELEASE_KEY)]
    return {key.removeprefix(RELEASE_KEY): Announced.decode(ReleaseAnnouncement.FromString(values[key])) for key in keys}


def formulas_of(values: Mapping[str, bytes]) -> dict[str, str]:
    """The announced formulas among `values`, by ranker."""
    keys = [key for key in values if key.startswith(FORMULA_KEY)]
    return {key.removeprefix(FORMULA_KEY): FormulaAnnouncement.FromString(values[key]).score_formula for key in keys}


def announce_release(settings: Settings, ranker: str, release_id: str, now_ms: int, generations: Mapping[str, str] | None = None) -> None:
    """Tells every server to serve a release, and which ones were announced before it. `generations`: by space, those to serve it with; the
    newest comparable ones of spaces that are not named.

    Raises:
        ProduceError, KafkaUnavailableError, TopicError: nothing was announced.
    """
    before = releases_of(announced(settings)).get(ranker)
    previous = () if before is None else before.followed_by(release_id)
    message = ReleaseAnnouncement(ranker=ranker, release_id=release_id, announced_time_ms=now_ms, previous=previous)
    message.generations.update(generations or {})
    announce(kafka_config(settings), settings.topic_announcements, RELEASE_KEY + ranker, message.SerializeToString())


def announce_formula(settings: Settings, ranker: str, text: str, now_ms: int) -> None:
    """Tells every server to score a ranker by a formula; empty: by that of its domain file again. Raises ProduceError."""
    value = None
    if text:
        value = FormulaAnnouncement(ranker=ranker, score_formula=text, announced_time_ms=now_ms).SerializeToString()
    announce(kafka_config(settings), settings.topic_announcements, FORMULA_KEY + ranker, value)


class News:
    """Passes announcements on to a ranking server, and holds them back until it has started with what was announced before.

    `take` is called in the thread that reads the topic, the rest in the server's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, bytes | None] = {}
        self._known: dict[str, bytes] = {}
        self._server: RankingServer | None = None

    def take(self, key: str, value: bytes | None) -> None:
        """An announcement, as `Announcements.on_change` is told it."""
        with self._lock:
            if self._server is None:
                self._held[key] = value
            else:
                self._pass_on(self._server, key, value)

    def known(self) -> dict[str, bytes]:
        """What has been announced up to now: for the server's start."""
        with self._lock:
            self._known = {key: value for key, value in self._held.items() if value is not None}
            return self._known

    def attach(self, server: RankingServer) -> None:
        """Passes on to a server that has started with `known`, from now on, and what has changed since."""
        with self._lock:
            self._server = server
            for key, value in self._held.items():
                if key.startswith((MOVE_KEY, EXPERIMENT_KEY)) or value != self._known.get(key):
                    self._pass_on(server, key, value)
            self._held.clear()

    @staticmethod
    def _pass_on(server: RankingServer, key: str, value: bytes | None) -> None:
        if value is not None and key.startswith(MOVE_KEY):
            server.service.lineage.add(Predecessor.decode(value))
        elif value is not None and key.startswith(RELEASE_KEY):
            message = ReleaseAnnouncement.FromString(value)
            server.announce(message.ranker, message.release_id, dict(message.generations))
        elif key.startswith(EXPERIMENT_KEY):
            server.experiment(key.removeprefix(EXPERIMENT_KEY), None if value is None else experiment_of(value))
        elif key.startswith(FORMULA_KEY):
            text = "" if value is None else FormulaAnnouncement.FromString(value).score_formula
            server.announce_formula(key.removeprefix(FORMULA_KEY), text)
