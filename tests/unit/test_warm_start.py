"""A server whose model does not load: what it becomes when another release takes its place, and what is left behind."""

import asyncio

import numpy as np
import pytest
from serving_world import NOW_MS, write_ranker, write_tables

from inference.served import Releases
from inference.triton import ModelUnavailableError


class LoadingTriton:
    """Loads every model but the `broken` ones; counts tries and unloads."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.loaded: set[str] = set()
        self.tries: dict[str, int] = {}

    async def ready(self, model: str) -> bool:
        return model in self.loaded

    async def load(self, model: str, **_: float) -> None:
        self.tries[model] = self.tries.get(model, 0) + 1
        self.loaded.add(model)  # Triton has it, and it may not answer all the same

    async def unload(self, model: str, **_: float) -> None:
        self.loaded.discard(model)

    async def infer(self, model, tensors, _output, **_):
        if model in self.broken:
            raise ModelUnavailableError(f"{model}: fails")
        return np.full((len(tensors["candidate_embedding"]), 1), 0.5, np.float32)


def play(tmp_path, scenario) -> None:
    async def run() -> None:
        generations, triton = write_tables(tmp_path / "tables"), LoadingTriton()
        made = [write_ranker(tmp_path / "releases", generations, "related", created_ms=NOW_MS, seed=0).release_id]
        releases = Releases(tmp_path / "releases", tmp_path / "tables", tmp_path / "repository", triton, unload_delay_s=0.0)
        triton.broken.add(made[0])
        await releases.start()
        made += [
            write_ranker(tmp_path / "releases", generations, "related", created_ms=NOW_MS + i * 1000, seed=i).release_id for i in (1, 2)
        ]
        try:
            await scenario(releases, triton, made)
        finally:
            await releases.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_server_is_warm_when_what_it_serves_now_is(tmp_path):
    async def scenario(releases, _triton, made) -> None:
        warming = asyncio.create_task(releases.warm())
        await asyncio.sleep(0)
        assert not warming.done()
        await releases.switch("related", made[1])
        await asyncio.wait_for(warming, 10)
        kept = releases._kept["related"].gate
        await asyncio.gather(kept._probe, return_exceptions=True)  # ends: nobody asks that model
        assert kept._probe.cancelled()

    play(tmp_path, scenario)


def test_a_switch_that_fails_leaves_no_model_behind(tmp_path):
    async def scenario(releases, triton, made) -> None:
        await releases.switch("related", made[1])
        triton.broken.add(made[2])
        with pytest.raises(ModelUnavailableError):
            await releases.switch("related", made[2])
        await asyncio.gather(*releases._retiring)
        assert made[2] not in triton.loaded
        assert releases.served["related"].release.release_id == made[1]

    play(tmp_path, scenario)


def test_trips_are_counted_on_when_another_release_takes_the_place(tmp_path):
    async def scenario(releases, triton, made) -> None:
        await releases.switch("related", made[1])
        served = releases.served["related"]
        triton.broken.add(made[1])
        with pytest.raises(ModelUnavailableError):
            await served.gate.infer({"candidate_embedding": np.zeros((3, 16), np.float16)}, timeout_s=1.0)
        assert releases.statistics()["model_trips"] == 1
        await releases.switch("related", made[2])
        assert releases.statistics()["model_trips"] == 1

    play(tmp_path, scenario)
