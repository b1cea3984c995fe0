"""What is served now: a release with one set of tables for each ranker, swapped as a whole while requests go on."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from features.domain import Domain, Ranker
from features.pack import Packer
from features.tables import TableError, TableSet, generations_of, lineage_of
from features.tensors import output_table
from inference.announced import Announced, options
from inference.beside import Beside
from inference.popularity import Popularity, open_popularity
from inference.release import (
    Release,
    ReleaseError,
    blank_request,
    load_small,
    open_release,
    release_folder,
    write_triton_model,
)
from inference.small import SmallModel
from inference.triton import ModelTimeoutError, ModelUnavailableError, Tensors, TritonError, TritonModels

log = logging.getLogger(__name__)

TIMEOUTS_IN_A_ROW_MAX = 3
FAIR_TIMEOUT_S = 0.25
"""A time-out counts against the model only if it was given this long: a caller in a hurry says nothing about Triton."""
PROBE_INTERVAL_S = 0.25
FLAP_S, REST_S_MAX = 10.0, 30.0
"""A model that fails within FLAP_S of its return rests before the next probe, each time twice as long, up to REST_S_MAX."""
CANDIDATES_OF_A_CALL = 16
COST_SHARE, COST_HALF_LIFE_S = 0.1, 5.0
"""Weight of the newest answer in the time that a candidate takes; without answers the estimate is halved in so many seconds."""
LOAD_TIMEOUT_S = 120.0
WARM_TIMEOUT_S = 10.0
RETRY_S_MIN, RETRY_S_MAX = 1.0, 30.0


class ModelGate:
    """Whether one model is asked at all. After a failure it is not, until a probe has loaded it again and got an answer.

    So a Triton that is gone costs the requests nothing but their tier, and one that is back (with no model loaded, under explicit model
    control) is in use again without anybody's doing.
    """

    def __init__(self, triton: TritonModels, release: Release, on_trip: Callable[[], None]) -> None:
        self.model = release.release_id
        self.opened = asyncio.Event()
        (self._output,) = output_table(release.domain, release.ranker)
        self._heads = self._output.shape[1]
        self._blank = blank_request(release.domain, release.ranker, 1)
        self._triton, self._on_trip = triton, on_trip
        self._timeouts = 0
        self._opened_s, self._rest_s = 0.0, 0.0
        self._cost_s, self._cost_at_s = 0.0, 0.0
        self._probe: asyncio.Task[None] | None = None

    @property
    def open(self) -> bool:
        """Whether the model is asked."""
        return self.opened.is_set()

    async def infer(self, tensors: Tensors, *, timeout_s: float) -> npt.NDArray[np.float32]:
        """Probabilities of a request, float32 [C, H].

        Raises:
            ModelUnavailableError, ModelTimeoutError: answer from another tier.
        """
        if not self.open:
            raise ModelUnavailableError(f"{self.model}: not asked since it failed; it is probed")
        started_s = time.monotonic()
        try:
            probability = await self._infer(tensors, timeout_s=timeout_s)
        except ModelTimeoutError as error:
            self._timeouts += timeout_s >= FAIR_TIMEOUT_S
            if self._timeouts >= TIMEOUTS_IN_A_ROW_MAX:
                self._trip(error)
            raise
        except ModelUnavailableError as error:
            self._trip(error)
            raise
        self._timeouts = 0
        self._learn_cost(len(probability), started_s)
        return probability

    def candidates_within(self, timeout_s: float) -> int:
        """How many candidates the model is likely to answer for in a time, by what it took of late, waiting included."""
        if timeout_s <= 0:
            return 0
        cost_s = self._cost_s * 0.5 ** ((time.monotonic() - self._cost_at_s) / COST_HALF_LIFE_S)
        return int(min(max(timeout_s / cost_s - CANDIDATES_OF_A_CALL, 0), 1e9)) if cost_s > 0 else int(1e9)

    async def bring_up(self) -> None:
        """Loads the model where it is not, asks it once, and opens. Raises TritonError."""
        if not await self._triton.ready(self.model):
            await self._triton.load(self.model, timeout_s=LOAD_TIMEOUT_S)
        await self._infer(self._blank, timeout_s=WARM_TIMEOUT_S)
        self._timeouts, self._opened_s = 0, time.monotonic()
        self.opened.set()

    async def rehearse(self, tensors: Tensors, *, timeout_s: float) -> npt.NDArray[np.float32]:
        """`infer` that counts for nothing: neither for the breaker nor for what a candidate costs. Raises as `infer`."""
        return await self._infer(tensors, timeout_s=timeout_s)

    def probe(self) -> None:
        """Starts probing in the background, until the gate is open."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._probe_until_open(), name=f"probe {self.model}")

    def rest(self) -> None:
        """Ends probing; `probe` or `bring_up` begins again."""
        if self._probe is not None:
            self._probe.cancel()

    async def close(self) -> None:
        """Ends probing."""
        self.opened.clear()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    def _learn_cost(self, candidates: int, started_s: float) -> None:
        now_s = time.monotonic()
        # A call has a cost of its own: counted as some candidates, or a request of one would make all others look dear.
        cost_s = (now_s - started_s) / (candidates + CANDIDATES_OF_A_CALL)
        self._cost_s = cost_s if not self._cost_s else self._cost_s + COST_SHARE * (cost_s - self._cost_s)
        self._cost_at_s = now_s

    def _trip(self, error: TritonError) -> None:
        if self.open:
            self.opened.clear()
            self._on_trip()
            again = time.monotonic() - self._opened_s < FLAP_S + self._rest_s
            self._rest_s = min(max(2 * self._rest_s, 2 * PROBE_INTERVAL_S), REST_S_MAX) if again else 0.0
            log.warning("model %s is out of use until a probe succeeds: %s", self.model, error)
        self.probe()

    async def _probe_until_open(self) -> None:
        reported = ""
        await asyncio.sleep(self._rest_s)
        while not self.open:
            try:
                await self.bring_up()
                log.info("model %s is in use", self.model)
            except TritonError as error:
                if str(error) != reported:
                    reported = str(error)
                    log.warning("model %s cannot be used yet: %s", self.model, error)
                await asyncio.sleep(PROBE_INTERVAL_S)

    async def _infer(self, tensors: Tensors, *, timeout_s: float) -> npt.NDArray[np.float32]:
        answer = await self._triton.infer(self.model, tensors, self._output.name, timeout_s=timeout_s)
        shape = (len(tensors["candidate_embedding"]), self._heads)
        if answer.shape != shape or answer.dtype != self._output.dtype:
            raise ModelUnavailableError(
                f"{self.model}: answered {answer.dtype} {list(answer.shape)}, not {self._output.dtype} {list(shape)}"
            )
        if not np.isfinite(answer).all():
            raise ModelUnavailableError(f"{self.model}: answered a probability that is not a number")
        return answer.astype(np.float32, copy=False)


@dataclass
class Served:
    """One release with one set of tables. Nothing of it changes but the count of requests that use it."""

    release: Release
    packer: Packer
    gate: ModelGate
    small: SmallModel | None = None
    popularity: Popularity | None = None
    domain: Domain = field(init=False)
    ranker: Ranker = field(init=False)
    generations: Mapping[str, str] = field(init=False)
    sequence_fingerprint: int = field(init=False)
    late_ms_max: int | None = field(init=False)
    """How far request_time_ms may lie behind the log's clock before evicted events are missed, milliseconds; None: nothing is evicted."""
    utilities: npt.NDArray[np.float32] = field(init=False)
    """Weight of each head in the domain file's final score, float32 [H]."""
    in_flight: int = 0

    def __post_init__(self) -> None:
        self.domain = self.release.domain
        self.ranker = self.domain.ranker[self.release.ranker]
        self.generations = self.packer.tables.generations
        self.utilities = np.array([head.utility for head in self.ranker.heads.values()], np.float32)
        self.sequence_fingerprint = self.release.sequence_fingerprint
        sequence = self.domain.sequence[self.ranker.sequence]
        self.late_ms_max = None if sequence.evict_age_ms is None else sequence.evict_age_ms - sequence.age_ms_max


class Releases:
    """Loads releases and tables, keeps one `Served` a ranker, and swaps it. The release that was served before stays loaded, so that going
    back takes milliseconds, until the next switch to another one.

    Args:
        releases: folder of releases.
        tables: root of the table generations.
        repository: Triton's model repository.
        triton: the client.
        threads: PyTorch threads of a model in Triton.
        device, batch_requests_max, batch_delay_us: see `write_triton_model`.
        unload_delay_s: how long a model that nothing here uses stays loaded: other servers of the same Triton may still be switching.
    """

    def __init__(
        self,
        releases: Path,
        tables: Path,
        repository: Path,
        triton: TritonModels,
        *,
        threads: int = 2,
        device: str = "auto",
        unload_delay_s: float = 10.0,
        batch_requests_max: int = 8,
        batch_delay_us: int = 0,
    ) -> None:
        self._folder, self._tables, self._repository, self._triton = Path(releases), Path(tables), Path(repository), triton
        self._threads, self._device, self._unload_delay_s = threads, device, unload_delay_s
        self._batch_requests_max, self._batch_delay_us = batch_requests_max, batch_delay_us
        self._served: dict[str, Served] = {}
        self._kept: dict[str, Served] = {}
        """The release before the present one, by ranker."""
        self.warm_up: Callable[[Served, bool], Awaitable[None]] | None = None
        """Asks a release what it will be asked, before it is; set by who knows (`inference.warmup`)."""
        self.any_served = asyncio.Event()
        self._switched = asyncio.Event()
        """Set at the next switch, and then another one."""
        self._lock = asyncio.Lock()
        self._announced: dict[str, tuple[str, dict[str, str]]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._closed = False
        self.beside = Beside(lambda ranker, release_id: self._prepare(ranker, release_id, {}), self._retire)
        """Releases that experiments name."""
        self.switches = 0
        self.switch_failures = 0
        self.model_trips = 0
        """Of every model since the start: gates come and go with their releases, and a counter must not fall."""

    @property
    def rankers(self) -> list[str]:
        """Names of the rankers served."""
        return sorted(self._served)

    @property
    def served(self) -> Mapping[str, Served]:
        """What is served by ranker, for who describes it; `use` is for requests."""
        return self._served

    @contextmanager
    def use(self, ranker: str, release_id: str = "") -> Iterator[Served]:
        """What is served for a ranker, which stays loaded until the block ends. With `release_id` the release of an experiment, where it
        is in use, else the served one all the same. Raises KeyError where there is none.
        """
        served = (release_id and self.beside.find(ranker, release_id)) or self._served[ranker]
        served.in_flight += 1
        try:
            yield served
        finally:
            served.in_flight -= 1
            if not served.in_flight and not self._is_held(served):
                self._retire(served)

    async def start(self, announced: Mapping[str, Announced] | None = None) -> None:
        """Opens for each ranker what is announced or newer (`inference.announced.options`), with the newest tables that fit it
        (`fitting_generations`). Models load in the background: see `warm`.

        An announced release that cannot be served is tried again in the background; until then the folder's newest one serves.

        Raises:
            ReleaseError, TableError: the newest release of the folder cannot be served; both sides are named.
        """
        for ranker, wanted in options(self._folder, announced or {}).items():
            for place, one in enumerate(wanted):
                try:
                    served = await asyncio.to_thread(self._prepare, ranker, one.release_id, dict(one.generations))
                except (ReleaseError, TableError) as error:
                    if one is not (announced or {}).get(ranker):
                        raise
                    log.warning("ranker %s: the announced release cannot be served: %s", ranker, error)
                    self.announce(ranker, one.release_id, one.generations)
                    continue
                if ranker in self._served:  # the announced one, which can be served after all
                    break
                if place:
                    log.warning("ranker %s: serving %s instead", ranker, one.release_id)
                self._served[ranker] = served
                self.any_served.set()
                served.gate.probe()
                break

    async def warm(self) -> None:
        """Returns once every ranker's model has answered for the first time, and after it what `warm_up` asks."""
        for ranker in list(self._served):
            while not (served := self._served[ranker]).gate.open:  # it may be another one by then: what is served counts
                waits = [asyncio.ensure_future(event.wait()) for event in (served.gate.opened, self._switched)]
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
            with suppress(TritonError):  # it is served already: its gate says whether it is asked
                await self._rehearse(served, True)

    async def switch(self, ranker: str, release_id: str, generations: Mapping[str, str] | None = None) -> None:
        """Serves another release, or other generations: loads and warms it first, then swaps one pointer.

        The release that was served before stays loaded; other generations of the same one until the last request that uses them has ended.
        For spaces that `generations` does not name see `fitting_generations`.

        Raises:
            ReleaseError, TableError: it cannot be served; what was served still is.
            TritonError: its model does not load; what was served still is.
        """
        async with self._lock:
            old = self._served.get(ranker)
            new = await self._open(ranker, release_id, dict(generations or {}))
            if new is old:
                return
            is_other_model = old is None or new.gate is not old.gate
            try:
                if is_other_model:
                    await new.gate.bring_up()
                await self._rehearse(new, is_other_model)
            except BaseException:
                if not self._is_held(new):
                    self._retire(new)  # Triton may have loaded it
                raise
            self._served[ranker] = new
            self._switched.set()
            self._switched = asyncio.Event()
            self.any_served.set()
            self.switches += 1
            log.info("ranker %s: serving %s with %s", ranker, release_id, dict(new.generations))
            gone = self._keep(ranker, old)
        self.beside.refresh(ranker)
        if gone is not None and not gone.in_flight and not self._is_held(gone):
            self._retire(gone)

    def announce(self, ranker: str, release_id: str, generations: Mapping[str, str]) -> None:
        """Switches in the background and tries again where that fails, until a later announcement. Called on the event loop."""
        if self._closed:
            return
        self._announced[ranker] = (release_id, dict(generations))
        self._news.setdefault(ranker, asyncio.Event()).set()
        if ranker not in self._tasks or self._tasks[ranker].done():
            self._tasks[ranker] = asyncio.create_task(self._follow(ranker), name=f"switch {ranker}")

    async def close(self) -> None:
        """Ends everything in the background. Models stay loaded: other servers may use them."""
        self._closed = True
        tasks = [*self._tasks.values(), *self._retiring]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.beside.close()
        for served in (*self._served.values(), *self._kept.values()):
            await served.gate.close()

    def statistics(self) -> dict[str, float]:
        """Counters since start."""
        gates = [served.gate for served in self._served.values()]
        return {
            "rankers": len(gates),
            "models_in_use": sum(gate.open for gate in gates),
            "model_trips": self.model_trips,
            "switches": self.switches,
            "switch_failures": self.switch_failures,
            "kept": len(self._kept),
            **self.beside.statistics(),
        }

    async def _open(self, ranker: str, release_id: str, generations: dict[str, str]) -> Served:
        """What is to be served: an object that is there already where it is the same, else a new one, with the model's gate where there is
        one: a model has one.
        """
        held = [one for one in (self._served.get(ranker), self._kept.get(ranker)) if one and one.release.release_id == release_id]
        for one in held:
            if one.generations == await asyncio.to_thread(self._generations, one.release, generations):
                return one
        new = await asyncio.to_thread(self._prepare, ranker, release_id, generations)
        if held:
            new.gate = held[0].gate
        return new

    def _generations(self, release: Release, named: dict[str, str]) -> dict[str, str]:
        """The generations that `_prepare` would open, without reading them."""
        fitting = fitting_generations(release, self._tables, named)
        return TableSet.open(self._tables, release.domain, release.ranker, fitting).generations

    def _keep(self, ranker: str, old: Served | None) -> Served | None:
        """Keeps the release before the present one; returns what nothing needs any more beside the requests that use it."""
        kept, new = self._kept.get(ranker), self._served[ranker]
        if old is None or old.release.release_id == new.release.release_id:
            return old
        self._kept[ranker] = old
        if not old.gate.open:  # not loaded again and again while nobody asks it
            old.gate.rest()
        return kept

    def _is_held(self, served: Served) -> bool:
        ranker = served.release.ranker
        return served is self._served.get(ranker) or served is self._kept.get(ranker) or self.beside.holds(served)

    async def _rehearse(self, served: Served, infer: bool) -> None:
        if self.warm_up is not None:
            await self.warm_up(served, infer)

    def _prepare(self, ranker: str, release_id: str, generations: dict[str, str]) -> Served:
        """Opens and checks everything; runs in a thread, and reads the tables' pages into memory there."""
        release = open_release(release_folder(self._folder, release_id))
        if release.ranker != ranker:
            raise ReleaseError(f"{release_id}: is a release of ranker {release.ranker!r}, not of {ranker!r}")
        fitting = fitting_generations(release, self._tables, generations)
        tables = TableSet.open(self._tables, release.domain, ranker, fitting, verify=True)
        write_triton_model(
            release,
            self._repository,
            threads=self._threads,
            device=self._device,
            batch_requests_max=self._batch_requests_max,
            batch_delay_us=self._batch_delay_us,
        )
        packer = Packer(release.domain, ranker, tables)
        popularity = open_popularity(self._tables, release.domain)
        return Served(release, packer, ModelGate(self._triton, release, self._tripped), load_small(release), popularity)

    async def _follow(self, ranker: str) -> None:
        delay_s, done = RETRY_S_MIN, None
        while (wanted := self._announced[ranker]) != done:
            self._news[ranker].clear()
            try:
                await self.switch(ranker, *wanted)
                delay_s, done = RETRY_S_MIN, wanted
            except (ReleaseError, TableError, TritonError, OSError) as error:
                self.switch_failures += 1
                log.warning("ranker %s: %s cannot be served, trying again in %.0f s: %s", ranker, wanted[0], delay_s, error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await self._news[ranker].wait()
                delay_s = min(2 * delay_s, RETRY_S_MAX)

    def _tripped(self) -> None:
        self.model_trips += 1

    def _retire(self, served: Served) -> None:
        task = asyncio.create_task(self._unload(served), name=f"unload {served.gate.model}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _unload(self, served: Served) -> None:
        await asyncio.sleep(self._unload_delay_s)
        async with self._lock:  # not while a switch may be bringing the same model back
            others = [*self._served.values(), *self._kept.values(), *self.beside]
            if not any(other.gate is served.gate for other in others):
                await served.gate.close()
            if any(other.gate.model == served.gate.model for other in others):
                return
            try:
                await self._triton.unload(served.gate.model)
            except TritonError as error:
                log.warning("model %s stays loaded: %s", served.gate.model, error)


def fitting_generations(release: Release, tables: Path, named: Mapping[str, str]) -> dict[str, str]:
    """The generations to serve a release with: `named`, and the newest comparable one of each embedding space that is not named there.

    Comparable are generations of the lineage that the release was trained with: another training's vectors would be noise to its model.
    Spaces without vectors are left to `TableSet.open`, which takes the newest.

    Raises:
        ReleaseError: a named generation is of another lineage.
        TableError: a named generation, or the one that the release was trained with, is not there.
    """
    chosen = dict(named)
    ranker = release.domain.ranker[release.ranker]
    for space in sorted({ranker.item_space, ranker.user_space} - {None}, key=str):
        space, trained = str(space), release.generations[str(space)]
        lineage = lineage_of(tables, space, trained)
        if space not in chosen:
            chosen[space] = next(generations_of(tables, space, lineage))
        elif (other := lineage_of(tables, space, chosen[space])) != lineage:
            theirs = f"generation {chosen[space]} of space {space} has lineage {other or 'none'}"
            raise ReleaseError(
                f"{release.release_id}: {theirs}, the release was trained with {trained} of lineage {lineage or 'none'}; "
                "name one of that lineage, or train and publish a release with the other"
            )
    return chosen
