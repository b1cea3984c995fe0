"""The worker core under a seeded simulation of faults, and that the simulation would notice: see `simulation.schedule`."""

import os

import pytest
from simulation.mutations import MUTATIONS
from simulation.run import Outcome, main, play_in_processes, replay_alone
from simulation.schedule import Simulation

SEEDS = 5_000
MUTATION_SEEDS_MAX = 600
"""A mutation is found by one of so many seeds; most are by one of the first ten."""


def test_state_and_reads_are_the_naive_fold_under_any_fault(capsys):
    outcome = Outcome()
    for found in play_in_processes(range(SEEDS), min(2, os.cpu_count() or 1)):
        outcome.add(found)
        assert not found.failures, "\n".join(f"seed {seed}: {error}; {replay_alone(seed)}" for seed, error in found.failures.items())
    assert outcome.seeds == SEEDS
    with capsys.disabled():
        print(f"\nsimulation: {SEEDS} seeds; " + ", ".join(f"{name.replace('_', ' ')} {times}" for name, times in outcome.happened.items()))
    assert outcome.never() == []


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_a_fault_in_the_code_is_found(mutation, monkeypatch):
    MUTATIONS[mutation](monkeypatch)
    for seed in range(MUTATION_SEEDS_MAX):  # all of which hold without it: see above
        try:
            Simulation(seed).run()
        except Exception as error:
            assert not isinstance(error, (TypeError, AttributeError, LookupError)), f"a fault of the mutation itself: {error!r}"  # noqa: PT017
            return
    pytest.fail(f"{MUTATION_SEEDS_MAX} seeds did not notice: {mutation}")


def test_a_seed_repeats_itself():
    for seed in (1, 168):
        assert Simulation(seed).run() == Simulation(seed).run()


def test_a_run_in_which_something_never_happened_fails(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", "--seeds", "1"])
    assert main() == 1
    assert ": never: such a run proves too little" in capsys.readouterr().out


def test_a_failing_seed_is_named_and_the_run_fails(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", "--seeds", "3", "--first", "7"])
    monkeypatch.setattr(Simulation, "_check_end", lambda _: 1 / 0)
    assert main() == 1
    assert "seed 9: ZeroDivisionError" in (shown := capsys.readouterr().out)
    assert "replay alone: python -m tests.simulation.run --seed 9" in shown
