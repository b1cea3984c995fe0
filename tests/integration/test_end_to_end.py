"""The whole path on KuaiRand: import, train briefly, publish, serve, produce the last day in order, rank at logged moments, replay.

Everything goes through the command line and real processes, as a user would run it.
"""

import base64
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from deploy import cli
from deploy.drive import drive, logged_moments, rank_fresh
from deploy.experiments import announced_experiments
from deploy.processes import kafka_config
from deploy.settings import load_settings
from deploy.stack import running
from features.actions import encode_action
from features.domain import load_domain
from features.ids import user_key
from features.logs import read_requests
from features.ports import Position
from inference.client import RankingClient
from inference.experiments import ExperimentError, choose
from streams.producer import ActionProducer

ROOT = Path(__file__).parents[2]
DOMAIN = ROOT / "domains" / "kuairand.toml"
DAY_MS = 86_400_000
MOMENTS = 500


def freshrank(*arguments, home=None, check=True):
    """Runs the command as a person would; returns its standard output."""
    command = [sys.executable, "-m", "deploy.cli", *arguments, *(("--home", str(home)) if home else ())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout if check else done


class Up:
    """`freshrank up` in a process."""

    def __init__(self, home):
        self.home = home
        environment = os.environ | {"FRESHRANK_INLINE_SHARE": "0.2", "FRESHRANK_RANK_TIMEOUT_MS": "5000"}
        command = [sys.executable, "-m", "deploy.cli", "up", "--json", "--home", str(home), "--domain", str(DOMAIN)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
        line = self.process.stdout.readline()
        assert line, f"freshrank up ended with {self.process.wait(30)}"
        self.endpoints = json.loads(line)
        self.settings = running(load_settings(home=home, domain=DOMAIN), needs="kafka")
        self.domain = load_domain(DOMAIN)

    def pid(self, name):
        return int((self.home / "run" / f"{name}.pid").read_text())

    def stop(self):
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, f"left behind: {alive}"
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def home(kuairand, tmp_path_factory):
    """A home folder with a release that was trained briefly on KuaiRand."""
    home = tmp_path_factory.mktemp("home")
    assert "canonical log" in freshrank("import", str(DOMAIN), str(kuairand), home=home)
    freshrank("train", "--domain", str(DOMAIN), "--epochs", "1", "--seconds", "25", home=home)
    assert freshrank("publish", "--domain", str(DOMAIN), home=home).startswith("feed-")
    return home


@pytest.fixture(scope="module")
def up(home):
    stack = Up(home)
    yield stack
    assert stack.stop() == 0


@pytest.fixture(scope="module")
def producer(up):
    producer = ActionProducer(kafka_config(up.settings), up.domain, up.settings.topic_actions)
    yield producer
    producer.close()


@pytest.fixture(scope="module")
def client(up):
    with RankingClient(up.endpoints["server"], timeout_s=10.0) as client:
        yield client


def after_of(position):
    return f"{position.log_epoch:016x}:{position.partition}:{position.offset}"


def test_last_day_served_and_replayed_without_a_different_byte(up, producer, client, home, tmp_path):
    log = home / "logs" / "kuairand"
    last_ms = max(int(batch.request_time_ms[-1]) for batch in read_requests(log, up.domain))
    from_ms = last_ms - DAY_MS
    moments = logged_moments(up.domain, "feed", log, from_ms=from_ms, count=MOMENTS)
    answers = list(drive(up.domain, log, moments, producer, client, kafka_config(up.settings), up.settings.topic_actions, from_ms=from_ms))
    assert len(answers) == len(moments) == MOMENTS
    assert {answer.tier for _, answer in answers} == {"model"}
    assert sum(answer.sequence_count > 0 for _, answer in answers) > MOMENTS / 10, "users of the last day have a past of that day"

    report = tmp_path / "parity.json"
    freshrank("replay", "--json", str(report), home=home)
    parity = json.loads(report.read_text())
    assert parity["ok"]
    assert parity["rankings_replayed"] >= MOMENTS
    assert parity["bytes_different"] == parity["digests_different"] == parity["rows_different"] == 0
    assert parity["rows_compared"] >= MOMENTS
    assert parity["scores_compared"] > 0
    assert parity["scores_different"] == 0

    archive = tmp_path / "archive"
    freshrank("replay", "--write-archive", str(archive), home=home)
    assert "OK" in freshrank("replay", "--archive", str(archive), home=home), "the same from Parquet, without Kafka"


def test_click_then_rank_always_sees_the_click(producer, client):
    """1,000 times: one action, one ranking after its position, always with the action in it."""
    for trial in range(1_000):
        user_id = 10**15 + trial % 50
        position = producer.produce(user_id=user_id, entity_kind="video", entity_id=trial % 97, action="click").result()
        answer = client.rank("feed", user_id, [1, 2], kinds=1, after=[position])
        assert answer.after_reached
        assert not answer.cold_start
        assert answer.sequence_count == min(trial // 50 + 1, 50)
        assert answer.watermark[0] >= position


@pytest.mark.usefixtures("up")
def test_command_line_produce_then_rank(home):
    before = json.loads(freshrank("rank", "--user", "ada", "--candidates", "7,8,9", "--json", home=home))
    position = freshrank("produce", "--user", "ada", "--item", "7", "--action", "click", home=home).strip()
    after = json.loads(freshrank("rank", "--user", "ada", "--candidates", "7,8,9", "--after", position, "--json", home=home))
    assert before["cold_start"]
    assert (after["sequence_count"], after["after_reached"], after["tier"]) == (1, True, "model")
    assert sorted(after["scores"]) != sorted(before["scores"])
    wrong = freshrank("produce", "--user", "ada", "--item", "7", "--action", "klick", home=home, check=False)
    assert wrong.returncode == 1
    assert "action: 'klick' is not in the domain file; allowed:" in wrong.stderr.replace("\n", " ")


def test_kcat_and_grpcurl_see_the_same(up, client):
    kcat, grpcurl = shutil.which("kcat"), shutil.which("grpcurl")
    if kcat is None or grpcurl is None:
        assert os.environ.get("CI") != "true", "kcat and grpcurl are required where CI=true"
        pytest.skip("kcat and grpcurl are not installed")
    user_id = 10**16
    now_ms = time.time_ns() // 1_000_000
    value = encode_action(user_id=user_id, entity_kind=1, entity_id=7, action=2, event_time_ms=now_ms, event_id=1)
    command = [
        kcat,
        "-P",
        "-b",
        up.endpoints["kafka"],
        "-t",
        up.settings.topic_actions,
        "-X",
        "partitioner=murmur2_random",
        "-K",
        "=:key:=",
        "-D",
        "=:end:=",
    ]
    subprocess.run(command, input=user_key(user_id) + b"=:key:=" + value, check=True, timeout=30)
    deadline = time.monotonic() + 20
    while not client.rank("feed", user_id, [1, 2], kinds=1).sequence_count:
        assert time.monotonic() < deadline, "kcat's action never became visible"
    request = {"ranker": "feed", "user_id": str(user_id), "candidate_ids": base64.b64encode(struct.pack("<3Q", 7, 8, 9)).decode()}
    done = subprocess.run(
        [grpcurl, "-plaintext", "-d", json.dumps(request), up.endpoints["server"], "freshrank.v1.Ranking/Rank"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = {name.replace("_", "").lower(): value for name, value in json.loads(done.stdout).items()}  # by version: snake or camel case
    assert answer["tier"] == "TIER_MODEL"
    assert answer["sequencecount"] == 1
    ranked = struct.unpack("<3Q", base64.b64decode(answer["rankedids"]))
    assert sorted(ranked) == [7, 8, 9]


def test_erase_is_gone_for_the_next_ranking_and_in_a_replay(producer, client, home, tmp_path):
    user_id = 10**16 + 1
    position = producer.produce(user_id=user_id, entity_kind="video", entity_id=3, action="click").result()
    assert client.rank("feed", user_id, [1, 2], kinds=1, after=[position]).sequence_count == 1
    erased = freshrank("erase", "--user", str(user_id), home=home).strip()
    epoch, partition, offset = erased.split(":")
    answer = client.rank("feed", user_id, [1, 2], kinds=1, after=[Position(int(epoch, 16), int(partition), int(offset))])
    assert answer.after_reached
    assert answer.cold_start
    assert answer.sequence_count == 0
    report = tmp_path / "parity.json"
    freshrank("replay", "--json", str(report), home=home)
    parity = json.loads(report.read_text())
    assert parity["ok"]
    assert parity["excluded"]["erased_since"] == 1, "the ranking before the erasure can no longer be rebuilt, by promise"


def test_worker_killed_comes_back_and_nothing_is_lost(up, producer, client):
    """SIGKILL in the midst of ingest: the stack restarts the worker, and each user's sequence is what was produced."""
    users = range(10**16 + 100, 10**16 + 140)
    killed = False
    positions = {}
    for event in range(30):
        for user_id in users:
            positions[user_id] = producer.produce(user_id=user_id, entity_kind="video", entity_id=event, action="click")
        if event == 15:
            os.kill(up.pid("worker"), signal.SIGKILL)
            killed = True
    producer.flush()
    assert killed
    for user_id in users:
        deadline = time.monotonic() + 60
        answer = client.rank("feed", user_id, [1], kinds=1, after=[positions[user_id].result()])
        while not answer.after_reached:
            assert time.monotonic() < deadline, "the worker did not come back"
            answer = client.rank("feed", user_id, [1], kinds=1, after=[positions[user_id].result()])
        assert answer.sequence_count == 30


def test_triton_killed_answers_from_a_named_tier_and_returns(up, client):
    os.kill(up.pid("triton"), signal.SIGKILL)
    tiers = []
    deadline = time.monotonic() + 90
    while not tiers or tiers[-1] != "model" or len(set(tiers)) == 1:
        assert time.monotonic() < deadline, f"tiers seen: {sorted(set(tiers))}"
        tiers.append(client.rank("feed", 1, np.arange(1, 20), kinds=1).tier)
    assert set(tiers) <= {"model", "small"}


def test_a_published_release_is_served_without_a_restart(client, home):
    """`freshrank publish` announces; the running server loads, warms and switches. No ranking fails meanwhile."""
    before = client.rank("feed", 1, [1, 2], kinds=1).release_id
    published = freshrank("publish", "--domain", str(DOMAIN), home=home).strip()
    assert published != before
    deadline = time.monotonic() + 60
    while (answer := client.rank("feed", 1, [1, 2], kinds=1)).release_id != published:
        assert answer.tier == "model"
        assert time.monotonic() < deadline, f"{published} was announced, {answer.release_id} is still served"


def command(*arguments, home):
    """`freshrank` in this process: starting one takes seconds."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [*arguments, "--home", str(home)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_an_experiment_its_shadow_a_comparison_and_an_explanation(up, producer, client, home, tmp_path):
    """A release that is not served gets an arm and a shadow by one command; the log then says what each did, and why."""
    served = client.rank("feed", 1, [1, 2], kinds=1).release_id
    canary = command("publish", "--only", "--domain", str(DOMAIN), home=home).strip()
    routes = ("--name", "exp1", "--arm", f"canary={canary}:50%", "--arm", "noop:20%", "--shadow", f"{canary}:100%")
    with pytest.raises(ExperimentError, match="101 % together"):
        command("experiment", "set", *routes, "--arm", "shuffle3:31%", home=home)
    command("experiment", "set", *routes, home=home)
    shown = json.loads(command("experiment", "show", "--json", home=home))
    assert [(one["name"], len(one["arms"]), len(one["shadows"])) for one in shown] == [("exp1", 2, 1)]
    experiment = announced_experiments(up.settings)["feed"]
    arm_of = {choose(experiment, user).arm: user for user in range(10**17, 10**17 + 100)}
    users = {arm: arm_of[arm] for arm in ("", "canary", "noop")}
    deadline = time.monotonic() + 60
    while client.rank("feed", users["canary"], [1, 2], kinds=1).release_id != canary:
        assert time.monotonic() < deadline, "the canary never took part"
    asked = {}
    for arm, user_id in users.items():
        positions = [producer.produce(user_id=user_id, entity_kind="video", entity_id=item, action="click").result() for item in (3, 4, 5)]
        asked[arm] = client.rank("feed", user_id, list(range(1, 21)), kinds=1, after=positions)
    assert {arm: answer.release_id for arm, answer in asked.items()} == {"": served, "canary": canary, "noop": served}
    assert asked["noop"].ids.tolist() == list(range(1, 21))

    figures = tmp_path / "comparison.json"
    compare = ("compare", "--base", served, "--other", canary, "--since", "1h", "--json", str(figures))
    compared = {"scores": {}, "arms": []}
    while not compared["scores"] or {arm["arm"] for arm in compared["arms"]} != {"-", "canary", "noop"}:  # records are sent a while later
        assert time.monotonic() < deadline, compared
        command(*compare, home=home)
        compared = json.loads(figures.read_text())
    assert compared["scores"]["final score"]["top3_overlap"]["mean"] == 1.0, "both releases have the same weights"
    assert figures.with_suffix(".png").exists()

    html = tmp_path / "why.html"
    text = command("explain", "--request-id", str(asked[""].request_id), "--html", str(html), home=home)
    assert "byte for byte" in text
    assert html.read_text().count("█") > 0
    live = command("explain", "--user", str(users["canary"]), "--candidates", "1,2,3", home=home)
    assert canary in live
    assert "exp1, arm canary" in live

    command("experiment", "stop", home=home)
    while client.rank("feed", users["canary"], [1, 2], kinds=1).release_id != served:
        assert time.monotonic() < deadline + 60
    report = tmp_path / "parity.json"
    command("replay", "--json", str(report), home=home)
    parity = json.loads(report.read_text())
    assert parity["ok"], parity["verdict"]
    assert parity["shadows_replayed"] >= 2
    assert parity["bytes_different"] == 0


def test_what_was_served_becomes_what_is_trained_on(up, producer, client, home, tmp_path):
    """Seen, clicked, left, acted on by another identity, without a request id, twice; a run killed; a late action; an erasure."""
    folder, report = home / "logs" / "kuairand.served", tmp_path / "label.json"
    person, device, idle, reader = (2 * 10**17 + n for n in range(4))

    def act(user_id, item, action, answer=None, **more):
        request_id = 0 if answer is None else answer.request_id
        return producer.produce(user_id=user_id, entity_kind="video", entity_id=int(item), action=action, request_id=request_id, **more)

    def labels(answer):
        """{item: (seen, labels)} of a list; None: not there."""
        for batch in read_requests(folder, up.domain):
            for i in np.flatnonzero(batch.request_id == answer.request_id).tolist():
                rows = range(batch.starts[i], batch.starts[i + 1])
                found = {row: batch.labels[batch.label_starts[row] : batch.label_starts[row + 1]].tolist() for row in rows}
                assert batch.served.table["release_id"][i].as_py() == answer.release_id
                return {int(batch.entity_id[row]): (bool(batch.seen[row]), found[row]) for row in rows}
        return None

    clicked = client.rank("feed", person, list(range(1, 11)), kinds=1, identities=[device])
    left, untouched = (client.rank("feed", user_id, list(range(1, 11)), kinds=1) for user_id in (reader, idle))
    first, second, third, fourth = clicked.ids[:4].tolist()
    for item in clicked.ids[:4]:
        act(person, item, "impression", clicked)
    for item in left.ids[:3]:
        act(reader, item, "impression", left)
    act(person, first, "click", clicked, event_id=77)
    act(person, first, "click", clicked, event_id=77)
    act(device, second, "like", clicked)
    act(person, third, "click")
    producer.flush()

    until_ms = time.time_ns() // 1_000_000 + 2 * 3_600_000
    arguments = ("label", "--window", "1h", "--until-ms", str(until_ms), "--json", str(report))
    killed = subprocess.Popen([sys.executable, "-m", "deploy.cli", *arguments, "--home", str(home)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / ".label" / "plan.json").exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL
    assert not (folder / "summary.json").exists()

    command(*arguments, home=home)
    while any(labels(answer) is None for answer in (clicked, left, untouched)):  # the ranking log's producer is asynchronous
        assert time.monotonic() < deadline
        command(*arguments, home=home)
    rows = labels(clicked)
    assert {item: found for item, (_, found) in rows.items() if found} == {first: [2], second: [4], third: [2]}
    assert {item for item, (seen, _) in rows.items() if seen} == {first, second, third, fourth}
    assert {item for item, (seen, _) in labels(left).items() if seen} == set(left.ids[:3].tolist())
    assert list(labels(untouched).values()) == [(False, [])] * 10

    act(reader, left.ids[0], "click", left)
    producer.flush()
    command(*arguments, home=home)
    assert json.loads(report.read_text())["added"] == 1
    assert labels(left)[int(left.ids[0])] == (True, [2])

    freshrank("erase", "--user", str(device), home=home)
    removed = json.loads(freshrank("erase-job", "run", "--json", home=home, check=False).stdout)["removed"]
    assert removed["canonical logs"] >= 11, "the list, its ten candidates, the device's action"
    assert labels(clicked) is None
    assert labels(left) is not None


def test_second_start_keeps_the_data(up, home, producer, client):
    """Last in this file: it stops the stack of the module and starts it again on the same folder."""
    position = producer.produce(user_id=31, entity_kind="video", entity_id=3, action="click").result()
    assert client.rank("feed", 31, [1], kinds=1, after=[position]).sequence_count == 1
    assert up.stop() == 0
    again = Up(home)
    up.process, up.endpoints, up.settings = again.process, again.endpoints, again.settings
    with RankingClient(up.endpoints["server"], timeout_s=10.0) as fresh:
        moment = logged_moments(up.domain, "feed", home / "logs" / "kuairand", from_ms=0, count=1)[0]
        moment.request.user_id, moment.request.request_time_ms = 31, 0
        assert rank_fresh(fresh, moment.request, position, 10.0).sequence_count == 1
