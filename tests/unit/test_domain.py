from pathlib import Path

import pytest

from features.domain import (
    Action,
    Counter,
    Domain,
    DomainError,
    Feature,
    Head,
    Log,
    ModelSettings,
    Negatives,
    Ranker,
    Refresh,
    Rule,
    Sequence,
    Source,
    load_domain,
    parse_domain,
)

DOMAINS = Path(__file__).parents[2] / "domains"
GOOD = """
name = "shop"
[entities]
product = 1
[surfaces]
home = 1
[actions]
impression = { id = 1, kind = "impression" }
click = { id = 2, kind = "positive" }
unclick = { id = 3, kind = "negative", retracts = "click" }
[sequence.main]
id = 1
caps = { impression = 10 }
[features.price]
side = "item"
kind = "number"
[ranker.home]
sequence = "main"
item_space = "coengagement"
features = ["price"]
[ranker.home.heads.click]
actions = ["click"]
[log]
files = ["log.csv"]
user = "user"
entity = "item"
entity_kind = "product"
time = "time"
[[log.actions]]
action = "click"
column = "event"
"""


BEFORE_ENCODINGS = 0xD627F77A215F9A63


def change(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_the_text_that_the_errors_are_made_from_is_good():
    domain = parse_domain(GOOD, source="shop.toml")
    assert domain.sequence["main"].length == 100
    assert domain.log is not None
    assert domain.log.actions[0].column == "event"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            change('kind = "impression"', 'kind = "seen"'),
            ["actions.impression.kind", "'positive', 'negative' or 'impression'", "found 'seen'"],
        ),
        (change("id = 2, kind", "id = 300, kind"), ["actions.click.id", "less than or equal to 255", "found 300"]),
        (change("id = 2, kind", "id = 0, kind"), ["actions.click.id", "greater than or equal to 1", "found 0"]),
        (change("id = 2, kind", "id = 1, kind"), ["actions: number 1 is used twice"]),
        (
            change('retracts = "click"', 'retracts = "clik"'),
            ["actions.unclick.retracts", "'clik' is not defined", "click, impression, unclick"],
        ),
        (change("caps = { impression", "caps = { seen"), ["sequence.main.caps", "'seen' is not defined", "click, impression, unclick"]),
        (change('sequence = "main"', 'sequence = "mian"'), ["ranker.home.sequence", "'mian' is not defined", "allowed: main"]),
        (change('features = ["price"]', 'feature = ["price"]'), ["ranker.home", "unknown key 'feature'", "features"]),
        (change('actions = ["click"]', 'actions = ["buy"]'), ["ranker.home.heads.click.actions", "'buy' is not defined"]),
        (change('user = "user"\n', ""), ["log.user: is missing"]),
        (change('time = "time"', 'time = "time"\ntime_unit = "h"'), ["log.time_unit", "'s', 'ms', 'us' or 'iso8601'", "found 'h'"]),
        (change('entity_kind = "product"', 'entity_kind = "video"'), ["log.entity_kind", "'video' is not defined", "allowed: product"]),
        (change('time = "time"', 'time = "time"\nposition = "p"\ncandidates = "c"'), ["log: position", "leave out position or candidates"]),
        (change('time = "time"', 'time = "time"\nsurfaces = { a = "home" }'), ["log: surfaces: needs surface"]),
        (change('column = "event"', 'equals = ["1"]'), ["log.actions.0", "need a column"]),
        (change('column = "event"', 'column = "e"\nequals = ["1"]\nat_least = 4'), ["log.actions.0", "either equals or at_least"]),
        (change('kind = "number"', 'kind = "number"\nmissing = 0'), ["features.price", "missing must not be 0"]),
        (change('kind = "number"', 'kind = "category"'), ["features.price", "either vocabulary or hash_buckets"]),
        (change('kind = "number"', 'kind = "picture"'), ["features.price.kind", "'number', 'category', 'list'", "found 'picture'"]),
        (change('name = "shop"', 'name = "The Shop"'), ["name", "found 'The Shop'"]),
        (change("[entities]", "[entities"), ["not valid TOML"]),
        (change("caps =", "age_days_max = inf\ncaps ="), ["sequence.main.age_days_max", "finite", "found inf"]),
        (change('actions = ["click"]', 'actions = ["click"]\nutility = nan'), ["ranker.home.heads.click.utility", "finite", "found nan"]),
        (
            change('actions = ["click"]', 'actions = ["click"]\nweights = { click = inf }'),
            ["ranker.home.heads.click.weights.click", "finite", "found inf"],
        ),
        (change('kind = "number"', 'kind = "number"\nmissing = nan'), ["features.price.missing", "finite", "found nan"]),
        (
            change('kind = "number"', 'kind = "category"\nvocabulary = ["a", "b", "a"]'),
            ["features.price: vocabulary: 'a' is there twice", "each once"],
        ),
        (change('features = ["price"]', 'features = ["price", "price"]'), ["ranker.home: features: 'price' is there twice", "each once"]),
        (
            change('features = ["price"]', 'sequence_attributes = ["value", "value"]'),
            ["ranker.home: sequence_attributes: 'value' is there twice"],
        ),
    ],
)
def test_errors_name_file_key_and_what_is_allowed(text, parts):
    with pytest.raises(DomainError) as error:
        parse_domain(text, source="shop.toml")
    for part in ("shop.toml: ", *parts):
        assert part in str(error.value)


def test_all_wrong_keys_are_named_at_once():
    text = change('kind = "impression"', 'kind = "seen"').replace("id = 2, kind", "id = 300, kind")
    with pytest.raises(DomainError) as error:
        parse_domain(text, source="shop.toml")
    assert len(str(error.value).splitlines()) == 2


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DomainError, match=r"none\.toml: cannot be read"):
        load_domain(tmp_path / "none.toml")


def test_the_fingerprint_includes_the_encodings_where_there_are_any():
    """States older than the option have the fingerprint of the default; the order of the option means nothing."""
    of = {
        option: parse_domain(f"{option}\n{GOOD}", source="a").sequence_fingerprint("main")
        for option in ("", "encodings = []", 'encodings = ["json"]', 'encodings = ["json", "schema_registry"]')
    }
    assert of[""] == of["encodings = []"] == BEFORE_ENCODINGS
    assert len(set(of.values())) == 3
    turned = parse_domain(f'encodings = ["schema_registry", "json"]\n{GOOD}', source="a")
    assert turned.sequence_fingerprint("main") == of['encodings = ["json", "schema_registry"]']
    for wrong in ('["xml"]', '["json", "json"]', '"json"'):
        with pytest.raises(DomainError, match="encodings"):
            parse_domain(f"encodings = {wrong}\n{GOOD}", source="a")


def test_the_fingerprint_is_of_what_the_store_keeps_alone():
    fingerprint = parse_domain(GOOD, source="a").sequence_fingerprint("main")
    assert (
        parse_domain(change('kind = "number"', 'kind = "number"\nmissing = -2.0'), source="a").sequence_fingerprint("main") == fingerprint
    )
    assert parse_domain(change("impression = 10", "impression = 11"), source="a").sequence_fingerprint("main") != fingerprint


@pytest.mark.parametrize("path", sorted(DOMAINS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_domain_files_are_good(path):
    domain = load_domain(path)
    assert domain.name == path.stem
    assert domain.log is not None


def test_one_shipped_product_has_two_rankers_over_one_state():
    assert sorted(load_domain(DOMAINS / "simulator.toml").ranker) == ["home", "related"]


def test_the_examples_of_the_documentation_are_good_and_no_key_is_left_out():
    text = (DOMAINS.parent / "docs" / "domain.md").read_text("utf-8")
    examples = [block.split("```")[0] for block in text.split("```toml\n")[1:]]
    assert [parse_domain(example, source="domain.md").name for example in examples] == ["videos", "shop"]
    for part in (Domain, Action, Sequence, Feature, Counter, Head, Ranker, ModelSettings, Refresh, Rule, Source, Log, Negatives):
        assert [key for key in part.model_fields if f"`{key}`" not in text and f"[{key}" not in text and f".{key}" not in text] == []
