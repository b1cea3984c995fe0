"""Experiments as a person types them, and what is refused before anybody hears of it."""

import pytest
from serving_world import write_ranker, write_tables
from typer.testing import CliRunner

from deploy import cli
from deploy.commands_experiment import experiments_table
from deploy.experiments import check_experiment, experiment_of, make_experiment, parse_arm, parse_shadow
from inference.experiments import Choice, ExperimentError, Experiments
from protos.v1.ranking_pb2 import TIER_CALLER_ORDER, Arm, Experiment

RELEASE = "home-20260701T120000Z-0123abcd"


def test_arms_are_read_as_they_are_typed():
    assert parse_arm(f"canary={RELEASE}:5%") == Arm(name="canary", release_id=RELEASE, share=500)
    assert parse_arm("noop:0.01%") == Arm(name="noop", noop=True, share=1)
    assert parse_arm("shuffle3:1.5%") == Arm(name="shuffle3", shuffle=3, share=150)
    assert parse_arm("mixed=shuffle12:100%") == Arm(name="mixed", shuffle=12, share=10_000)
    assert (parse_shadow(f"{RELEASE}:10%").release_id, parse_shadow(f"{RELEASE}:10%").share) == (RELEASE, 1_000)


@pytest.mark.parametrize("text", ["noop", "noop:5", "noop:0%", "noop:101%", "noop:0.001%", "noop:-1%", ":5%", "other:5%", "noop:x%"])
def test_what_is_no_arm_is_refused_with_what_to_write(text):
    with pytest.raises(ExperimentError, match=r"--arm .*(share|NAME=RELEASE)"):
        parse_arm(text)


@pytest.mark.parametrize(
    ("arms", "shadows", "what"),
    [
        ([], [], "neither an arm nor a shadow"),
        (["noop:60%", "shuffle1:41%"], [], r"101 % together; at most 100 %"),
        (["noop:1%", "noop:2%"], [], "'noop' stands there twice"),
        (["shuffle0:1%"], [], "arm shuffle0: needs a release, noop, or shuffle with a bound"),
        ([f"canary={RELEASE}:1%"], [], rf"release {RELEASE}: .*publish it here first"),
        ([], [f"{RELEASE}:1%"], rf"release {RELEASE}: .*publish it here first"),
        (["a=../x:1%"], [], r"'\.\./x' is not RANKER"),
    ],
)
def test_what_cannot_run_is_refused_and_named(tmp_path, arms, shadows, what):
    with pytest.raises(ExperimentError, match=what):
        check_experiment(make_experiment("home", "exp1", arms, shadows, 1), tmp_path)


def test_a_release_of_another_ranker_is_refused(tmp_path):
    release = write_ranker(tmp_path / "releases", write_tables(tmp_path / "tables"), "related")
    check_experiment(make_experiment("related", "exp1", [f"a={release.release_id}:1%"], [], 1), tmp_path / "releases")
    with pytest.raises(ExperimentError, match=r"of ranker 'related', the experiment of 'home'"):
        check_experiment(make_experiment("home", "exp1", [f"a={release.release_id}:1%"], [], 1), tmp_path / "releases")


def test_the_command_refuses_before_it_asks_for_a_stack(tmp_path):
    options = ["experiment", "set", "--name", "exp1", "--arm", "noop:70%", "--arm", "shuffle2:40%", "--home", str(tmp_path)]
    result = CliRunner().invoke(cli.app, options)
    assert isinstance(result.exception, ExperimentError)
    assert "110 % together" in str(result.exception)


def test_the_table_says_what_the_rest_of_the_users_get():
    table = experiments_table({"home": make_experiment("home", "exp1", ["noop:1%", "shuffle3:2.5%"], [f"{RELEASE}:10%"], 1)})
    assert list(table.columns[3].cells) == ["noop", "shuffle3", "-", "shadow"]
    assert list(table.columns[4].cells) == ["1 % of users", "2.5 % of users", "96.5 % of users", "10 % of requests"]


def test_an_announcement_that_cannot_run_leaves_the_one_before():
    experiments = Experiments()
    experiments.set("home", make_experiment("home", "exp1", ["noop:100%"], [], 1))
    with pytest.raises(ExperimentError):
        experiments.set("home", Experiment(ranker="home", name="exp2"))
    assert experiments.choose("home", 1) == Choice("exp1", "noop", tier=TIER_CALLER_ORDER)
    experiments.set("home", None)
    assert experiments.choose("home", 1) == Choice()
    with pytest.raises(ExperimentError, match="set it again, or stop it"):
        experiment_of(b"\xff")
