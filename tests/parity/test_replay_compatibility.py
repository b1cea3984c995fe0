"""A product grows: an action, an attribute, a head and a feature are added. No state is rebuilt, and replay agrees on both sides.

Records and rankings of before and after lie in the same logs; so do those that older and newer programs wrote.
"""

import numpy as np
import pytest
from test_replay import DOMAIN, ITEMS, START_MS, MemoryLog, World, make_world, random_actions, serve

from features.domain import parse_domain
from features.sequence import definition
from features.tables import Member, TableSet, write_generation
from inference.formula import Formula
from inference.release import open_release, write_release
from inference.transact import TransActRanker
from protos.v1.ranking_pb2 import RankingRecord

RETRACTS = 'unlike = { id = 3, kind = "negative", retracts = "like" }'
PRICE = 'price = { side = "item", kind = "number" }'
CLICK = 'heads.click = { actions = ["click"] }'
GROWN = (
    DOMAIN.replace(RETRACTS, f'{RETRACTS}\nshare = {{ id = 9, kind = "positive" }}')
    .replace(PRICE, f'{PRICE}\nstock = {{ side = "item", kind = "number" }}')
    .replace('features = ["price", "tags"', 'score = "click + 2*share - unlike"\nfeatures = ["stock", "price", "tags"')
    .replace(CLICK, f'{CLICK}\nheads.share = {{ actions = ["share"] }}')
)
"""Action 9 is in the log from the beginning, when no domain file knew it."""
LEANER = DOMAIN.replace('sequence_attributes = ["surface", "value"]\n', "")
"""As the product began, without the attributes."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A world of the leaner release, served again by the grown one over the same log; rankings of both are in one log."""
    root = tmp_path_factory.mktemp("world")
    world = make_world(root, LEANER, random_actions(size=500))
    rng = np.random.default_rng(8)
    old = TableSet.open(world.tables, parse_domain(LEANER, source="test"), "home")
    assert old.features is not None
    price, tags = (old.features.column("item.product", name) for name in ("price", "tags"))
    columns = {"price": price[1:], "tags": tags[1:], "stock": rng.random(len(ITEMS), np.float32)}
    users = Member(old.features.ids("user"), features={"country": old.features.column("user", "country")[1:]})
    write_generation(world.tables, "features", START_MS, {"item.product": Member(ITEMS, features=columns), "user": users})
    generations = TableSet.open(world.tables, parse_domain(GROWN, source="test"), "home").generations
    release = write_release(
        world.releases,
        model=TransActRanker(parse_domain(GROWN, source="test"), "home"),
        domain_toml=GROWN,
        ranker="home",
        created_ms=START_MS + 1000,
        generations=generations,
        metrics={},
    )
    later = serve(world.actions, world.releases, world.tables, release.release_id, seed=7)
    by_formula(world, release.release_id, later)
    both = {partition: [*records, *later[partition]] for partition, records in world.rankings.records.items()}
    return World(world.actions, MemoryLog("rankings", 1, both), world.releases, world.tables, release.release_id), len(later[0]) + len(
        later[1]
    )


def by_formula(world, release_id, rankings):
    """Scores the rankings by the release's own formula, as the server does."""
    release = open_release(world.releases / release_id)
    formula = Formula(release.domain, "home", release.domain.ranker["home"].score)
    heads = list(release.domain.ranker["home"].heads)
    for records in rankings.values():
        for place, (append_ms, key, value) in enumerate(records):
            record = RankingRecord.FromString(value)
            probability = np.stack([np.frombuffer(record.head_scores[name], "<f4") for name in heads], 1)
            record.scores, record.score_formula = formula.scores(probability, {}).tobytes(), formula.text
            records[place] = (append_ms, key, record.SerializeToString())


def test_a_grown_domain_has_the_state_of_before():
    old, new = parse_domain(LEANER, source="test"), parse_domain(GROWN, source="test")
    assert old.sequence_fingerprint("main") == new.sequence_fingerprint("main"), "no row is rebuilt"
    assert definition(old, "main") == definition(new, "main")


def test_rankings_from_before_and_after_replay_to_the_byte(grown, tmp_path):
    world, later = grown
    report = world.replay(tmp_path, score_sample=1_000)
    assert report.ok, report.to_text()
    assert (report.bytes_different, report.rows_different, report.scores_different) == (0, 0, 0)
    releases = {record.release_id for record in world.records()}
    assert len(releases) == 2
    assert report.rankings_replayed == report.scores_compared > later > 50
    assert report.events_rejected > 0


def test_a_wrong_formula_in_the_log_is_caught(grown, tmp_path):
    world, _ = grown
    taken = {partition: list(records) for partition, records in world.rankings.records.items()}
    for record in world.records():
        if record.score_formula:
            record.score_formula = "click + share - unlike"
    try:
        report = world.replay(tmp_path, score_sample=1_000)
    finally:
        world.rankings.records.update(taken)
    assert not report.ok
    assert report.scores_different > 50
    assert report.bytes_different == 0


def test_records_of_an_older_and_of_a_newer_program_replay(grown, tmp_path):
    """The older one knew no source, no age and no formula; the newer one writes fields that this one does not know."""
    world, _ = grown
    before = {partition: list(records) for partition, records in world.rankings.records.items()}
    for partition, records in world.rankings.records.items():
        for place, (append_ms, key, value) in enumerate(records):
            record = RankingRecord.FromString(value)
            if record.score_formula:
                value += b"\xfa\x3e\x05later" if place % 2 else b""  # field 1007
            else:
                for name in ("sequence_source", "state_age_ms", "after_reached"):
                    record.ClearField(name)
                value = record.SerializeToString()
            world.rankings.records[partition][place] = (append_ms, key, value)
    try:
        report = world.replay(tmp_path, score_sample=50)
    finally:
        world.rankings.records.update(before)
    assert report.ok, report.to_text()
    assert report.bytes_different == 0
