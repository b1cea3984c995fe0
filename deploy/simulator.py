"""A simulated product whose users have an intent that drifts within a session, for the demo, tests and benchmarks.

How the data comes about. There are `CATEGORIES` latent categories.
- An item belongs to one category (weight 1), or, one in three, to two (weight 0.6 each); it has a quality. What a model sees of this is
  noisy: a shelf (eight shelves hold three categories each), tags (one in four is wrong), a rating (quality plus noise), a price (nothing).
- A user has a taste over categories (Dirichlet, mostly two or three) and one disliked category. Seen: a declared interest (the best
  category, right in half of all cases), an activity count.
- A session has an intent, one category: half of the time drawn from the taste, half of the time anything. After each request it changes
  with probability 0.12, to a category drawn the same way. The intent is never written down; clicks of the same session show it.
- A request shows 20 items: on `home` 4 of the intent, 6 of the taste and 10 of anything; on `related` (a fifth of the requests behind the
  first) 7 of the intent. The retrieval score is the taste with noise: retrieval does not know the intent.
- A click has the log odds -3.6 + 4 x item's weight of the intent + 1.2 x taste + 0.6 x quality - 1.5 x dislike; so an item of the intent
  is clicked in about half of all cases, another one in about 1 of 20. A click may bring a like, a like may be taken back, and an item of
  the disliked category may be hidden. A click's value is the dwell time.
So the taste can be learned from what was long ago, but most of what decides a click shows only in the latest actions. The first request
of a session gives no sign of its intent, and an intent may change without a sign: no model can be right always.
Requests of a session are 45 to 120 s apart and all actions on one come before the next. Times are milliseconds, in DAYS days from START_MS.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv

CATEGORIES = 24
CANDIDATES = 20
START_MS = 1_735_689_600_000  # 2025-01-01 UTC
DAYS = 14
DAY_MS = 86_400_000
DEVICES = ("phone", "tablet", "web")
EVENTS_FILE, ITEMS_FILE, USERS_FILE = "events.csv", "items.csv", "users.csv"

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass
class SimulatedUser:
    """A user in a session of their own. `user_id` is what the product knows; the rest is the truth behind it."""

    user_id: int
    index: int
    intent: int
    device: str
    requests: int = 0


@dataclass(frozen=True)
class SimulatedRequest:
    """What is to be ranked: candidate_ids uint64 [20], retrieval_score float32 [20]; the device is the user's."""

    user: SimulatedUser
    time_ms: int
    surface: str
    candidate_ids: npt.NDArray[np.uint64]
    retrieval_score: npt.NDArray[np.float32]


@dataclass(frozen=True)
class SimulatedAction:
    """One action of a user. value: dwell in milliseconds of a click, NaN otherwise."""

    action: str
    entity_id: int
    time_ms: int
    value: float


@dataclass(frozen=True)
class _Response:
    """What S users do with [S, 20] items. Times are milliseconds after the request."""

    clicked: Bools
    liked: Bools
    unliked: Bools
    hidden: Bools
    delay_ms: Ints
    dwell_ms: Ints


class Simulator:
    """The product: items 1..items, users 1..users, and behind them `held_back` users who never appear in the written log."""

    def __init__(self, seed: int = 7, *, users: int = 2000, held_back: int = 200, items: int = 2000) -> None:
        """Draws items and users; the same seed and sizes give the same product."""
        rng = np.random.default_rng([seed, 0])
        self.seed, self.users, self.held_back, self.items = seed, users, held_back, items
        self._rng = np.random.default_rng([seed, 1])
        first = rng.integers(0, CATEGORIES, items)
        second = (first + rng.integers(1, CATEGORIES, items)) % CATEGORIES
        ambiguous = rng.random(items) < 1 / 3
        self._weight = np.zeros((items, CATEGORIES))
        self._weight[np.arange(items), first] = np.where(ambiguous, 0.6, 1.0)
        self._weight[np.flatnonzero(ambiguous), second[ambiguous]] = 0.6
        self._quality = rng.normal(size=items)
        self._first, self._second = first, np.where(ambiguous, second, first)
        self._by_category = [np.flatnonzero(self._weight[:, category] > 0) for category in range(CATEGORIES)]
        self._sizes = np.array([len(found) for found in self._by_category])
        self._padded = np.stack([np.resize(found, self._sizes.max()) for found in self._by_category])
        everyone = users + held_back
        self._taste = rng.dirichlet(np.full(CATEGORIES, 0.12), everyone)
        self._dislike = (self._taste.argmax(1) + rng.integers(1, CATEGORIES, everyone)) % CATEGORIES
        self._activity = rng.gamma(2.0, 1.0, everyone)

    @property
    def held_back_users(self) -> range:
        """Ids of the users who are not in the log."""
        return range(self.users + 1, self.users + self.held_back + 1)

    def user(self, user_id: int) -> SimulatedUser:
        """A user at the begin of a new session."""
        if not 1 <= user_id <= self.users + self.held_back:
            raise ValueError(f"user_id: {user_id} is not in 1..{self.users + self.held_back}")
        index = user_id - 1
        intent = int(self._intents(self._rng, np.array([index]))[0])
        return SimulatedUser(user_id, index, intent, DEVICES[int(self._rng.integers(len(DEVICES)))])

    def request(self, user: SimulatedUser, time_ms: int) -> SimulatedRequest:
        """The user's next request at `time_ms`; the intent may drift before it."""
        rng = self._rng
        who = np.array([user.index])
        related = np.zeros(1, bool)
        if user.requests:
            user.intent = int(self._drift(rng, who, np.array([user.intent]))[0])
            related = rng.random(1) < 0.2
        user.requests += 1
        shown = self._candidates(rng, who, np.array([user.intent]), related)[0]
        score = self._retrieval_scores(rng, who, shown[None])[0]
        return SimulatedRequest(user, time_ms, "related" if related[0] else "home", (shown + 1).astype(np.uint64), score)

    def respond(self, request: SimulatedRequest) -> list[SimulatedAction]:
        """What the user does with the candidates, in the order of time; positions do not matter to these users."""
        shown = request.candidate_ids.astype(np.int64)[None] - 1
        response = self._respond(self._rng, np.array([request.user.index]), np.array([request.user.intent]), shown)
        actions = [
            SimulatedAction(name, int(request.candidate_ids[place]), request.time_ms + delay_ms, value)
            for name, _, place, delay_ms, value in _response_events(response)
        ]
        return sorted(actions, key=lambda action: action.time_ms)

    def write(self, folder: str | Path, *, requests: int = 30_000) -> None:
        """Writes events.csv, items.csv and users.csv, as domains/simulator.toml reads them; the same bytes for the same arguments."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([self.seed, 2])
        pacsv.write_csv(self._events(rng, requests), folder / EVENTS_FILE)
        pacsv.write_csv(self._item_table(rng), folder / ITEMS_FILE)
        pacsv.write_csv(self._user_table(rng), folder / USERS_FILE)

    # The process. Arrays have one row a session; `users` and items are indices from 0.

    def _intents(self, rng: np.random.Generator, users: Ints) -> Ints:
        from_taste = (self._taste[users].cumsum(1) < rng.random((len(users), 1))).sum(1).clip(max=CATEGORIES - 1)
        return np.where(rng.random(len(users)) < 0.5, from_taste, rng.integers(0, CATEGORIES, len(users)))

    def _drift(self, rng: np.random.Generator, users: Ints, intents: Ints) -> Ints:
        return np.where(rng.random(len(users)) < 0.12, self._intents(rng, users), intents)

    def _of_category(self, rng: np.random.Generator, categories: Ints) -> Ints:
        place = (rng.random(categories.shape) * self._sizes[categories]).astype(np.int64)
        found: Ints = self._padded[categories, place]
        return found

    def _candidates(self, rng: np.random.Generator, users: Ints, intents: Ints, related: Bools) -> Ints:
        """Distinct items [S, 20], in random order."""
        S, spare = len(users), 12
        of_intent = np.repeat(intents[:, None], 7, axis=1)
        taste = self._taste[users].cumsum(1)
        of_taste = (taste[:, None, :] < rng.random((S, 6, 1))).sum(2).clip(max=CATEGORIES - 1)
        wanted = np.concatenate([of_intent, of_taste, rng.integers(0, CATEGORIES, (S, 7 + spare))], axis=1)
        drawn = self._of_category(rng, wanted)
        anything = rng.integers(0, self.items, (S, 3))
        drawn[:, 4:7] = np.where(related[:, None], drawn[:, 4:7], anything)
        order = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, order, axis=1)
        again = np.zeros(drawn.shape, bool)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        shown = np.take_along_axis(drawn, np.argsort(again, axis=1, kind="stable"), axis=1)[:, :CANDIDATES]
        for row in np.flatnonzero((~again).sum(1) < CANDIDATES):
            others = np.setdiff1d(np.arange(self.items), shown[row])
            shown[row] = np.concatenate([np.unique(shown[row]), rng.permutation(others)])[:CANDIDATES]
        return np.take_along_axis(shown, rng.random(shown.shape).argsort(1), axis=1)

    def _retrieval_scores(self, rng: np.random.Generator, users: Ints, shown: Ints) -> npt.NDArray[np.float32]:
        taste = np.einsum("sck,sk->sc", self._weight[shown], self._taste[users])
        score: npt.NDArray[np.float32] = (taste + rng.normal(0, 0.15, shown.shape)).round(4).astype(np.float32)
        return score

    def _respond(self, rng: np.random.Generator, users: Ints, intents: Ints, shown: Ints) -> _Response:
        weight = self._weight[shown]
        match = np.take_along_axis(weight, intents[:, None, None], axis=2)[:, :, 0]
        dislike = np.take_along_axis(weight, self._dislike[users][:, None, None], axis=2)[:, :, 0]
        taste = np.einsum("sck,sk->sc", weight, self._taste[users])
        quality = self._quality[shown]

        def happens(log_odds: Floats) -> Bools:
            return rng.random(log_odds.shape) < 1 / (1 + np.exp(-log_odds))

        clicked = happens(-3.6 + 4.0 * match + 1.2 * taste + 0.6 * quality - 1.5 * dislike)
        liked = clicked & happens(-2.0 + 0.8 * quality + match)
        hidden = ~clicked & happens(-5.5 + 4.0 * dislike - 0.4 * quality)
        unliked = liked & (rng.random(shown.shape) < 0.1)
        delay_ms = rng.integers(1_000, 15_000, shown.shape)
        dwell_ms = np.exp(rng.normal(8.2 + 0.8 * match, 0.6)).astype(np.int64)
        return _Response(clicked, liked, unliked, hidden, delay_ms, dwell_ms)

    # The log

    def _sessions(self, rng: np.random.Generator, requests: int) -> tuple[Ints, Ints, Ints]:
        """User, first time and length of each session; lengths sum to `requests`."""
        lengths = rng.geometric(0.2, requests).clip(max=15)
        lengths = lengths[: int(np.searchsorted(lengths.cumsum(), requests)) + 1]
        lengths[-1] -= lengths.sum() - requests
        S = len(lengths)
        share = self._activity[: self.users]
        users = rng.choice(self.users, S, p=share / share.sum())
        hour = (rng.normal(19.5, 3.5, S) % 24) * 3_600_000
        begin_ms = START_MS + rng.integers(0, DAYS, S) * DAY_MS + hour.astype(np.int64)
        order = np.lexsort((begin_ms, users))
        users, begin_ms = users[order], begin_ms[order]
        for n in range(1, S):  # sessions of a user never overlap: one lasts at most 15 x 2 minutes
            if users[n] == users[n - 1]:
                begin_ms[n] = max(begin_ms[n], begin_ms[n - 1] + 2_700_000)
        return users, begin_ms, lengths

    def _events(self, rng: np.random.Generator, requests: int) -> pa.Table:
        users, time_ms, lengths = self._sessions(rng, requests)
        intents, devices = self._intents(rng, users), rng.integers(0, len(DEVICES), len(users))
        parts: list[dict[str, npt.NDArray[Any]]] = []
        first_request = 1
        for step in range(int(lengths.max())):
            going = np.flatnonzero(lengths > step)
            related = np.zeros(len(going), bool)
            if step:
                intents[going] = self._drift(rng, users[going], intents[going])
                related = rng.random(len(going)) < 0.2
            shown = self._candidates(rng, users[going], intents[going], related)
            scores = self._retrieval_scores(rng, users[going], shown)
            response = self._respond(rng, users[going], intents[going], shown)
            ids = first_request + np.arange(len(going))
            first_request += len(going)
            context = (ids, users[going] + 1, time_ms[going], np.where(related, "related", "home"), np.array(DEVICES)[devices[going]])
            parts += _rows(context, shown + 1, scores, response)
            time_ms[going] += rng.integers(45_000, 120_000, len(going))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((columns["position"], columns["time_ms"]))
        arrays = {name: column[order] for name, column in columns.items()}
        optional = {
            "position": arrays["position"] < 0,
            "dwell_ms": arrays["dwell_ms"] < 0,
            "retrieval_score": np.isnan(arrays["retrieval_score"]),
        }
        return pa.table({name: pa.array(column, mask=optional.get(name)) for name, column in arrays.items()})

    def _item_table(self, rng: np.random.Generator) -> pa.Table:
        n = self.items
        guess = rng.integers(0, CATEGORIES, (n, 2))
        wrong = rng.random((n, 2)) < 0.25
        tags = np.where(wrong, guess, np.stack([self._first, self._second], axis=1))
        rating = np.round(3 + 0.6 * self._quality + rng.normal(0, 0.5, n), 2)
        return pa.table(
            {
                "item": np.arange(1, n + 1),
                "shelf": [f"shelf_{category // 3}" for category in self._first],
                "tags": [f"t{a}|t{b}" if a != b else f"t{a}" for a, b in tags],
                "rating": pa.array(rating, mask=rng.random(n) < 0.05),
                "price": np.round(np.exp(rng.normal(3, 1, n)), 2),
            }
        )

    def _user_table(self, rng: np.random.Generator) -> pa.Table:
        n = self.users + self.held_back
        guess = rng.integers(0, CATEGORIES, n)
        declared = np.where(rng.random(n) < 0.5, self._taste.argmax(1), guess)
        return pa.table(
            {
                "user": np.arange(1, n + 1),
                "declared_interest": pa.array([f"c{category}" for category in declared], mask=rng.random(n) < 0.1),
                "activity": rng.poisson(10 * self._activity),
            }
        )

    def _kuairand_log(self, rng: np.random.Generator, n: int) -> pa.Table:
        users = np.sort(rng.choice(self.users, n, p=self._activity / self._activity.sum()))
        time_ms = rng.integers(*_KUAIRAND_TIMES_MS, n)
        time_ms = time_ms[np.lexsort((time_ms, users))]
        intents = self._intents(rng, users)
        shown = np.where(rng.random(n) < 0.5, self._of_category(rng, intents), rng.integers(0, self.items, n))
        response = self._respond(rng, users, intents, shown[:, None])
        click = response.clicked[:, 0] | (rng.random(n) < 0.3)
        long_view = click & (rng.random(n) < 0.65)
        duration_ms = 8_000 + 997 * (shown % 120)
        play_ms = np.where(long_view, duration_ms, np.where(click, duration_ms // 4, rng.integers(0, 3_000, n)))
        rare = {"is_like": 0.04, "is_follow": 0.003, "is_comment": 0.006, "is_forward": 0.002, "is_profile_enter": 0.04}
        flags = {name: (click & (rng.random(n) < rate)).astype(np.int64) for name, rate in rare.items()}
        moment = time_ms.astype("datetime64[ms]") + np.timedelta64(8, "h")  # the publishers' dates are those of China
        clock = [str(value) for value in moment.astype("datetime64[h]")]
        columns: dict[str, Any] = {"user_id": users, "video_id": shown}
        columns |= {"date": [int(text[:10].replace("-", "")) for text in clock], "hourmin": [int(text[11:13]) * 100 for text in clock]}
        columns |= {"time_ms": time_ms, "is_click": click.astype(np.int64)}
        columns |= {name: flags[name] for name in ("is_like", "is_follow", "is_comment", "is_forward")}
        columns |= {"is_hate": (~click & (rng.random(n) < 0.002)).astype(np.int64), "long_view": long_view.astype(np.int64)}
        columns |= {"play_time_ms": play_ms, "duration_ms": duration_ms, "profile_stay_time": 2_000 * flags["is_profile_enter"]}
        columns |= {"comment_stay_time": 3_000 * flags["is_comment"], "is_profile_enter": flags["is_profile_enter"]}
        columns |= {"is_rand": np.zeros(n, np.int64), "tab": rng.choice([1, 0, 4, 2, 6, 8], n, p=[0.78, 0.09, 0.06, 0.03, 0.03, 0.01])}
        return pa.table(columns)

    def _kuairand_videos(self, rng: np.random.Generator) -> pa.Table:
        n = self.items
        video = np.arange(n)
        several = (self._first != self._second) & (rng.random(n) < 0.8)
        return pa.table(
            {
                "video_id": video,
                "author_id": rng.integers(1, n, n),
                "video_type": np.where(rng.random(n) < 0.01, "AD", "NORMAL"),
                "upload_dt": np.where(rng.random(n) < 0.5, "2022-04-10", "2022-04-09"),
                "upload_type": np.array(["LongImport", "Web", "ShortImport", "Kmovie"])[rng.integers(0, 4, n)],
                "visible_status": np.full(n, "0.0"),
                "video_duration": pa.array([f"{8_000 + 997 * (i % 120)}.0" for i in video], mask=rng.random(n) < 0.03),
                "server_width": np.full(n, "720.0"),
                "server_height": np.full(n, "1280.0"),
                "music_id": rng.integers(10**9, 10**10, n),
                "music_type": pa.array(np.where(rng.random(n) < 0.9, "9.0", "4.0"), mask=rng.random(n) < 0.03),
                "tag": [f"{a},{b}" if both else str(a) for a, b, both in zip(self._first, self._second, several, strict=True)],
            }
        )


def _response_events(response: _Response) -> Iterator[tuple[str, int, int, int, float]]:
    """(action, row, place, delay in ms, value) of each action."""
    for name, happened, factor in (("click", response.clicked, 1), ("like", response.liked, 2), ("hide", response.hidden, 1)):
        for row, place in zip(*np.nonzero(happened), strict=True):
            value = float(response.dwell_ms[row, place]) if name == "click" else float("nan")
            yield name, int(row), int(place), int(response.delay_ms[row, place]) * factor, value
            if name == "like" and response.unliked[row, place]:
                yield "unlike", int(row), int(place), int(response.delay_ms[row, place]) * 3 - 1, float("nan")


def _rows(
    context: tuple[npt.NDArray[Any], ...], items: Ints, scores: npt.NDArray[np.float32], response: _Response
) -> list[dict[str, npt.NDArray[Any]]]:
    """Columns of the log for one request of each session: its impressions, then its actions."""
    request, user, time_ms, surface, device = context
    S, C = items.shape
    nothing = np.full(S * C, -1, np.int64)
    shown = np.ones((S, C), bool)
    place = np.tile(np.arange(C), (S, 1))
    once, twice, thrice = response.delay_ms, response.delay_ms * 2, response.delay_ms * 3 - 1
    kinds = (
        ("impression", shown, np.zeros((S, C), np.int64)),
        ("click", response.clicked, once),
        ("like", response.liked, twice),
        ("unlike", response.unliked, thrice),
        ("hide", response.hidden, once),
    )
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for name, happened, delay_ms in kinds:
        row = np.nonzero(happened)[0]
        is_shown = name == "impression"
        parts.append(
            {
                "time_ms": time_ms[row] + delay_ms[happened],
                "user": user[row],
                "request": request[row],
                "event": np.full(len(row), name),
                "item": items[happened],
                "position": place[happened] if is_shown else nothing[: len(row)],
                "surface": surface[row],
                "dwell_ms": response.dwell_ms[happened] if name == "click" else nothing[: len(row)],
                "retrieval_score": scores[happened] if is_shown else np.full(len(row), np.nan, np.float32),
                "device": device[row],
            }
        )
    return parts


KUAIRAND_FILES = ("log_standard_4_22_to_5_08_pure.csv", "user_features_pure.csv", "video_features_basic_pure.csv")
_KUAIRAND_TIMES_MS = (1_650_812_741_436, 1_652_025_130_564)


def write_kuairand_like(folder: str | Path, seed: int = 7, *, users: int = 2000, videos: int = 800, impressions: int = 24_000) -> None:
    """Writes a generated log under the file names and columns of KuaiRand-Pure, for who does not have the data.

    Only the form is KuaiRand's (columns, ranges, rates of actions, thin histories, ms times of the same two weeks); what users want comes
    from the simulator's categories. Nothing measured on it says anything about KuaiRand.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 3])
    product = Simulator(seed, users=users, held_back=0, items=videos)
    tables = (product._kuairand_log(rng, impressions), _kuairand_users(rng, users), product._kuairand_videos(rng))
    for name, table in zip(KUAIRAND_FILES, tables, strict=True):
        pacsv.write_csv(table, folder / name, pacsv.WriteOptions(quoting_style="needed"))


def _kuairand_users(rng: np.random.Generator, n: int) -> pa.Table:
    follow, fans, friends = (np.exp(rng.normal(mean, 1.5, n)).astype(np.int64) for mean in (4.0, 3.5, 2.0))
    days = rng.integers(15, 2_000, n)
    columns: dict[str, Any] = {
        "user_id": np.arange(n),
        "user_active_degree": np.array(["full_active", "high_active", "middle_active"])[rng.choice(3, n, p=[0.68, 0.24, 0.08])],
        "is_lowactive_period": np.zeros(n, np.int64),
        "is_live_streamer": np.where(rng.random(n) < 0.2, 1, -124),
        "is_video_author": (rng.random(n) < 0.8).astype(np.int64),
    }
    for name, count, edge in (("follow_user", follow, 50), ("fans_user", fans, 100), ("friend_user", friends, 30)):
        columns |= {f"{name}_num": count, f"{name}_num_range": np.where(count > edge, f"({edge},500]", f"(0,{edge}]")}
    columns |= {"register_days": days, "register_days_range": np.where(days > 730, "730+", "15-730")}
    sizes = (2, 7, 50, 1471, 16, 34, 3, 118, 454, 7, 5, 5, 2, 2, 2, 2, 2, 2)
    for number, size in enumerate(sizes):
        codes = rng.integers(0, size, n)
        columns[f"onehot_feat{number}"] = np.char.add(codes.astype(str), ".0") if number in (4, *range(12, 18)) else codes
    return pa.table(columns)
