"""Experiments from the operator's side: what a person types becomes an announcement, checked before anybody hears of it."""

import re
from collections.abc import Sequence as Seq
from pathlib import Path

from google.protobuf.message import DecodeError

from deploy.processes import kafka_config
from deploy.settings import Settings
from inference.experiments import SHARES, ExperimentError, check, needed
from inference.release import ReleaseError, open_release, release_folder
from protos.v1.ranking_pb2 import Arm, Experiment, Shadow
from streams.broadcast import Announcements, announce

EXPERIMENT_KEY = "experiment/"
"""What an announcement of an experiment is known by: its key is this and the ranker."""
_SHARED = re.compile(r"(.+):(\d{1,3}(?:\.\d{1,2})?)%", re.ASCII)
_SHUFFLE = re.compile(r"shuffle(\d{1,4})")


def parse_arm(text: str) -> Arm:
    """`NAME=RELEASE:5%`, or a control: `noop:1%`, `shuffle3:1%` (at most 3 places), either also with `NAME=`. Raises ExperimentError."""
    what, share = _share(text, "--arm")
    name, _, control = what.rpartition("=")
    arm = Arm(name=name or control, share=share)
    if control == "noop":
        arm.noop = True
    elif found := _SHUFFLE.fullmatch(control):
        arm.shuffle = int(found[1])
    elif name:
        arm.release_id = control
    else:
        raise ExperimentError(f"--arm {text!r}: needs NAME=RELEASE:SHARE%, noop:SHARE% or shuffleN:SHARE%")
    return arm


def parse_shadow(text: str) -> Shadow:
    """`RELEASE:10%`. Raises ExperimentError."""
    release_id, share = _share(text, "--shadow")
    return Shadow(release_id=release_id, share=share)


def _share(text: str, option: str) -> tuple[str, int]:
    found = _SHARED.fullmatch(text)
    share = round(float(found[2]) * SHARES / 100) if found else 0
    if found is None or not 0 < share <= SHARES:
        raise ExperimentError(f"{option} {text!r}: must end with its share, such as :5%, from 0.01 to 100 in steps of 0.01")
    return found[1], share


def check_experiment(experiment: Experiment, releases: Path) -> None:
    """Raises ExperimentError: shares, names, or a release that is not in the folder `releases`, is damaged, or of another ranker."""
    check(experiment)
    for release_id in sorted(needed(experiment)):
        try:
            ranker = open_release(release_folder(releases, release_id)).ranker
        except ReleaseError as error:
            raise ExperimentError(f"release {error}; publish it here first, for a start with `freshrank publish --only`") from error
        if ranker != experiment.ranker:
            raise ExperimentError(f"release {release_id}: is of ranker {ranker!r}, the experiment of {experiment.ranker!r}")


def make_experiment(ranker: str, name: str, arms: Seq[str], shadows: Seq[str], now_ms: int) -> Experiment:
    """The message, from what was typed. Raises ExperimentError."""
    return Experiment(
        ranker=ranker,
        name=name,
        arms=[parse_arm(text) for text in arms],
        shadows=[parse_shadow(text) for text in shadows],
        announced_time_ms=now_ms,
    )


def announce_experiment(settings: Settings, ranker: str, experiment: Experiment | None) -> None:
    """Tells every server to route by it; None: to stop. Raises ProduceError."""
    value = None if experiment is None else experiment.SerializeToString()
    announce(kafka_config(settings), settings.topic_announcements, EXPERIMENT_KEY + ranker, value)


def announced_experiments(settings: Settings) -> dict[str, Experiment]:
    """The experiments that run, by ranker. Raises KafkaUnavailableError, TopicError."""
    announcements = Announcements(kafka_config(settings), settings.topic_announcements)
    try:
        values = announcements.values()
    finally:
        announcements.close()
    return {
        key.removeprefix(EXPERIMENT_KEY): experiment_of(value) for key, value in sorted(values.items()) if key.startswith(EXPERIMENT_KEY)
    }


def experiment_of(value: bytes) -> Experiment:
    """The announcement's value. Raises ExperimentError."""
    try:
        return Experiment.FromString(value)
    except DecodeError as error:
        raise ExperimentError("an announced experiment is not a freshrank.v1.Experiment; set it again, or stop it") from error
