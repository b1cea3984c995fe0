"""Adjacent versions in every pairing: producer and worker, server and caller, server and release, server and announcement, one state.

The other version is made from what there is: "older" is a message class without the newest fields, "newer" one with fields that nobody
knows here yet. Older and newer ranking records are replayed in tests/parity/test_replay_compatibility.py.
"""

import json
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from serving_stack import CANDIDATES, USER, Stack, serving
from serving_world import DOMAIN, DOMAIN_TOML, NOW_MS, VIDEO, make_events, make_model, write_ranker

from features.actions import ACTION, decode_batch, encode_action
from features.domain import parse_domain
from features.ids import partition_of, user_key
from inference.announced import Announced
from inference.client import rank_request
from inference.release import _content, write_release
from inference.transact import TransActRanker
from protos.v1 import actions_pb2, erasure_pb2, owners_pb2, ranking_pb2, sequence_pb2
from protos.v1.ranking_pb2 import RankRequest, RankResponse, ReleaseAnnouncement

pytestmark = pytest.mark.servers
FILES = (actions_pb2, ranking_pb2, sequence_pb2, owners_pb2, erasure_pb2)
LATER = 1007
"""Number of a field of the next version."""
NEWEST = {
    "RankRequest": {"score_formula", "tier"},
    "RankResponse": {"score_formula", "sequence_source", "state_age_ms"},
    "ReleaseAnnouncement": {"previous"},
}
"""What the version before this one did not have."""


def classes(change) -> dict[str, type]:
    """Message classes of the protos after a change of each message's descriptor, in a pool of their own."""
    pool = descriptor_pool.DescriptorPool()
    names = []
    for module in FILES:
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        for message in file.message_type:
            change(message)
            names.append(f"{file.package}.{message.name}")
        pool.Add(file)
    return {name.rpartition(".")[2]: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


def _without_newest(message) -> None:
    kept = [field for field in message.field if field.name not in NEWEST.get(message.name, ())]
    del message.field[:]
    message.field.extend(kept)


def _with_later(message) -> None:
    kind = descriptor_pb2.FieldDescriptorProto
    message.field.add(name="of_the_next_version", number=LATER, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL)


OLDER, NEWER = classes(_without_newest), classes(_with_later)


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    with serving(tmp_path_factory.mktemp("serving"), rankers=("related",)) as stack:
        yield stack


def call(stack, data: bytes) -> bytes:
    """Rank over a plain channel: bytes in, bytes out."""
    with grpc.insecure_channel(stack.address) as channel:
        return channel.unary_unary("/freshrank.v1.Ranking/Rank")(data, timeout=20)


def request_of(**fields) -> RankRequest:
    return rank_request("related", USER, CANDIDATES, **{"kinds": VIDEO, "request_time_ms": NOW_MS} | fields)


@pytest.mark.parametrize("name", sorted(NEWER))
def test_every_message_passes_through_the_other_version_without_loss(name):
    """A reader that does not know a field keeps its bytes: what it writes on is whole."""
    newer = NEWER[name](of_the_next_version="later")
    ours = next(getattr(module, name) for module in FILES if hasattr(module, name))
    passed = ours.FromString(newer.SerializeToString())
    assert NEWER[name].FromString(passed.SerializeToString()).of_the_next_version == "later"
    older = OLDER[name].FromString(newer.SerializeToString())
    assert NEWER[name].FromString(older.SerializeToString()).of_the_next_version == "later"


@pytest.mark.parametrize("version", [OLDER, NEWER], ids=["older", "newer"])
def test_a_caller_of_the_other_version_gets_the_same_ranking(stack, version):
    asked = version["RankRequest"].FromString(request_of(request_id=5).SerializeToString())
    if version is NEWER:
        asked.of_the_next_version = "later"
    answered = version["RankResponse"].FromString(call(stack, asked.SerializeToString()))
    ours = RankResponse.FromString(call(stack, request_of(request_id=5).SerializeToString()))
    assert answered.ranked_ids == ours.ranked_ids
    assert answered.scores == ours.scores
    assert (answered.tier, answered.release_id, answered.sequence_count) == (ours.tier, ours.release_id, ours.sequence_count)
    logged = stack.logged()[-2].request
    assert (b"later" in logged.SerializeToString()) == (version is NEWER), "the log keeps the request as it came"


def test_an_older_caller_is_answered_what_a_newer_server_adds(stack):
    """To an older caller a new field of the answer is bytes that it does not look at."""
    stack.server.announce_formula("related", "-like")
    try:
        answer = OLDER["RankResponse"].FromString(call(stack, request_of().SerializeToString()))
    finally:
        stack.server.announce_formula("related", "")
    assert not hasattr(answer, "score_formula")
    assert RankResponse.FromString(answer.SerializeToString()).score_formula == "-like"
    likes, scores = np.frombuffer(answer.head_scores["like"], "<f4"), np.frombuffer(answer.scores, "<f4")
    np.testing.assert_allclose(scores, -likes, atol=1e-6)


def test_producers_of_other_versions_and_a_worker_of_this_one():
    fields = {"user_id": USER, "entity_kind": 1, "entity_id": 9, "action": 2, "event_time_ms": NOW_MS, "event_id": 3}
    ours = encode_action(**fields)
    newer = ours + bytes([0xFA, 0x3E, 5]) + b"later"
    sparse = actions_pb2.Action(**fields).SerializeToString()  # of before there were surface, value and request_id
    values = [ours, newer, sparse]
    batch = decode_batch(
        log_epoch=1,
        partition=partition_of(user_key(USER), 4),
        offsets=np.arange(len(values)),
        keys=[user_key(USER)] * len(values),
        values=values,
        append_times_ms=np.full(len(values), NOW_MS),
        future_tolerance_ms=0,
        partition_count=4,
    )
    assert batch.verdict.tolist() == [ACTION] * len(values), batch.reasons
    assert batch.events[0].tobytes() == batch.events[1].tobytes()
    assert batch.events[["entity_id", "action", "event_id"]][2] == batch.events[["entity_id", "action", "event_id"]][0]


def test_announcements_of_other_versions():
    said = OLDER["ReleaseAnnouncement"](ranker="home", release_id="r", announced_time_ms=7).SerializeToString()
    assert Announced.decode(ReleaseAnnouncement.FromString(said)) == Announced("r", {}, 7, ())
    ours = ReleaseAnnouncement(ranker="home", release_id="r", previous=["q"], announced_time_ms=7).SerializeToString()
    assert OLDER["ReleaseAnnouncement"].FromString(ours).release_id == "r"
    newer = NEWER["ReleaseAnnouncement"](ranker="home", release_id="r", of_the_next_version="x").SerializeToString()
    assert Announced.decode(ReleaseAnnouncement.FromString(newer)).release_id == "r"


HIDE = 'hide = { id = 5, kind = "negative" }'
PRICE = 'price = { side = "candidate"'
SPACE = 'item_space = "related_items"'
GROWN = (
    DOMAIN_TOML.replace(HIDE, f'{HIDE}\nshare = {{ id = 6, kind = "positive" }}')
    .replace(PRICE, f'margin = {{ side = "candidate", kind = "number" }}\n{PRICE}')
    .replace(SPACE, f'{SPACE}\nfeatures = ["margin"]\nsequence_attributes = ["surface"]')
) + 'share = { actions = ["share"] }\n'


def test_a_grown_release_serves_the_state_of_before_and_the_old_one_comes_back(stack):
    """One added action, attribute, head and feature; actions that were produced before the release knew them count from then on."""
    domain = parse_domain(GROWN, source="test")
    assert domain.sequence_fingerprint("main") == DOMAIN.sequence_fingerprint("main")
    events = make_events(15)
    events["action"][:4] = 6
    row = stack.reader.rows[USER]
    stack.reader.put(USER, events)
    before = stack.rank(ranker="related")
    try:
        release = write_release(
            stack.config.releases,
            model=TransActRanker(domain, "related").eval(),
            domain_toml=GROWN,
            ranker="related",
            created_ms=NOW_MS + 1000,
            generations=stack.generations,
            metrics={},
        )
        stack.run(stack.server.switch("related", release.release_id), 120)
        grown = stack.rank(ranker="related")
        assert (grown.tier, sorted(grown.head_scores)) == ("model", ["like", "share"])
        assert (before.sequence_count, grown.sequence_count) == (11, 15)
        with_feature = stack.rank(ranker="related", candidate_features={"margin": np.linspace(0, 9, len(CANDIDATES))})
        assert with_feature.scores.tolist() != grown.scores.tolist()
        assert grown.watermark == before.watermark, "of one state"
        stack.run(stack.server.switch("related", before.release_id), 120)
        assert stack.rank(ranker="related").scores.tolist() == before.scores.tolist()
    finally:
        stack.reader.rows[USER] = row


def test_a_release_of_the_next_version_is_refused_by_name_and_the_present_one_serves_on(stack):
    before = stack.rank(ranker="related")
    model = make_model("related", seed=5)
    written = write_release(
        stack.config.releases,
        model=model,
        domain_toml=DOMAIN_TOML,
        ranker="related",
        created_ms=NOW_MS - 5000,
        generations=stack.generations,
        metrics={},
    )
    manifest = json.loads((written.folder / "manifest.json").read_text())
    manifest.pop("release_id")
    for change, why in (({"format_version": 2}, "upgrade this program"), ({"files": {**manifest["files"], "later.bin": "0"}}, "later.bin")):
        later = manifest | change
        release_id = f"{written.release_id[:-8]}{_content(later)}"
        folder = written.folder.with_name(release_id)
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"release_id": release_id, **later}))
        with pytest.raises(ValueError, match=why):
            stack.run(stack.server.switch("related", release_id))
    after = stack.rank(ranker="related")
    assert (after.release_id, after.scores.tolist()) == (before.release_id, before.scores.tolist())


def test_a_release_of_before_there_were_small_models_and_formulas_serves(stack):
    old = write_ranker(stack.config.releases, stack.generations, "related", created_ms=NOW_MS - 9000, seed=8)
    assert sorted(path.name for path in old.folder.iterdir()) == ["domain.toml", "manifest.json", "model.safetensors"]
    assert b"score" not in (old.folder / "domain.toml").read_bytes()
    served = stack.server.releases._prepare("related", old.release_id, {})
    assert (served.small, served.ranker.score) == (None, None)
