"""A first domain file from a published log: guesses what each column is, from its name and its values, and says why.

A guess is a start, not an answer: what a column means is the product's to say. So each one stands in the draft with its reason, what might
tell the future is left out (how long something was watched, how long a session became), and `freshrank check` and `freshrank import` take
the draft as it is.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from features.domain import DomainError, parse_domain
from streams.draft_text import Action, Draft, FeatureGuess, Table, draft_toml, free_name, parts
from streams.sample import Sampled, read_sample

_USER = {
    "user", "visitor", "customer", "member", "client", "viewer", "person", "account", "buyer",
    "reader", "listener", "player", "uid", "who",
}  # fmt: skip
_ITEM = {
    "item", "product", "article", "video", "artist", "track", "song", "movie", "book", "news", "content", "sku", "asin", "pin", "post",
    "photo", "image", "listing", "document", "doc", "ad", "offer", "good", "hotel", "restaurant", "venue", "game", "app", "recipe", "story",
    "clip", "episode", "show", "property", "job", "creative",
}  # fmt: skip
_ID = {"id", "ids", "hash", "key", "uuid", "no", "code"}
_TIME = {"time", "timestamp", "ts", "date", "datetime", "at", "when", "ms", "created", "unix", "utc", "moment"}
_EVENT = {"event", "action", "type", "behavior", "behaviour", "interaction", "activity", "verb", "feedback", "op"}
_REQUEST = {"request", "search", "query", "impression", "slate", "serp", "ranking"}
_POSITION = {"position", "rank", "pos", "slot", "index"}
_SURFACE = {"surface", "tab", "placement", "page", "screen", "channel"}
_RATING = {"rating", "ratings", "score", "stars", "grade"}
_VALUE = (
    "play", "dwell", "watch", "watched", "listened", "stay", "value", "weight", "amount",
    "spent", "revenue", "quantity", "qty", "price",
)  # fmt: skip
_OUTCOME = {*_VALUE[:-1], "size", "end", "duration", "next", "total", "count", "revenue", "comment", "reading", "exit"}
_PRICE = {"price", "cost", "bid", "discount", "fee", "score", "distance"}
_SHOWN = {"impression", "impressions", "imp", "shown", "show", "exposure", "expose", "exposed", "display", "displayed", "served", "seen"}
_NEGATIVE = {
    "dislike", "hide", "hate", "skip", "block", "report", "remove", "unlike", "unfollow", "unsave", "delete", "downvote", "mute", "spam",
    "reject", "uncart", "return", "refund", "complain", "unsubscribe",
}  # fmt: skip
_ACTS = _NEGATIVE | {
    "click", "like", "follow", "comment", "forward", "share", "save", "buy", "purchase", "cart", "order", "favorite", "favourite", "view",
    "play", "finish", "install", "conversion", "convert", "book", "enter", "download", "subscribe", "reply", "retweet", "bought", "watch",
    "read", "open", "tap", "bookmark", "add", "listen", "attributed",
}  # fmt: skip
_FIXED = {"request_id", "user_id", "request_time_ms", "position", "surface", "entity_kind", "entity_id", "labels"}
_VOCABULARY_MAX = 30


class DraftError(ValueError):
    """A file that no domain file can be drafted from; says which column to name."""


def draft_domain(
    path: Path,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    items: Path | None = None,
    users: Path | None = None,
) -> tuple[str, Draft]:
    """The text of a domain file for the log file `path`, and what was guessed; columns that are given are not guessed.

    `items` and `users` are files with a row for each item or user, in the log's folder or below it.

    Raises:
        DraftError: no column can be the user's or the item's, or nothing in the log is an action.
        PublishedError: the file cannot be read.
    """
    draft = Draft(read_sample(path))
    for role, given in (("user", user), ("entity", item), ("time", time)):
        if given is not None:
            if given not in draft.sample.columns:
                raise DraftError(f"{path}: no column {given!r}; there: {', '.join(draft.sample.columns)}")
            draft.take(role, draft.sample.columns[given], "you said so")
    _guess_time(draft)
    _guess_candidates(draft)
    _guess_ids(draft)
    _guess_actions(draft)
    _guess_request(draft)
    _guess_value(draft)
    for side, role, file in (("item", "entity", items), ("user", "user", users)):
        if file is not None:
            _guess_table(draft, side, draft.sample.columns[draft.roles[role]], file)
    for column in draft.free():
        _guess_feature(draft, column)
    text = draft_toml(draft)
    try:
        parse_domain(text, source="draft")
    except DomainError as error:  # pragma: no cover - a defect of this module, said as one
        raise AssertionError(f"the draft of {path} is no domain file: {error}\n{text}") from error
    return text, draft


def _guess_time(draft: Draft) -> None:
    columns = draft.sample.columns
    if "time" not in draft.roles:
        dated = {
            word: name for word in ("year", "month", "day", "hour", "minute", "second") for name in columns if word in columns[name].words
        }
        found = [
            column for column in columns.values() if column.time_unit is not None and not (column.words & _ID and not column.words & _TIME)
        ]
        if found:
            best = max(found, key=lambda column: (bool(column.words & _TIME), column.distinct))
            why = "its name" if best.words & _TIME else "no name says it, but its numbers are times"
            draft.take("time", best, f"{why}; of {len(found)} columns that may be times the finest" if len(found) > 1 else why)
        elif {"year", "month", "day"} <= set(dated):
            draft.time_parts = tuple(dict.fromkeys(dated.values()))
            draft.say("time_parts", ", ".join(draft.time_parts), "their names; a day is all that is known of the order of actions")
            return
        else:
            draft.say(
                "time", "none", "no column has times: rows count in the file's order, and ages, windows and requests by gap mean nothing"
            )
            return
    unit = columns[draft.roles["time"]].time_unit
    if unit is None:
        raise DraftError(f"{draft.sample.path}: {draft.roles['time']!r} holds no times (seconds, ms or us of 1990 to 2100, or ISO 8601)")
    draft.time_unit = unit
    draft.say("time_unit", unit, "the only unit in which its values lie between 1990 and 2100" if unit != "iso8601" else "its texts")


def _guess_candidates(draft: Draft) -> None:
    """A list that holds the value of another column in its own row: what was shown, and what was acted on."""
    columns = draft.sample.columns
    random = np.random.default_rng(0)
    for column in columns.values():
        separator = "" if column.is_list else column.list_separator()
        if separator is None:
            continue
        rows = np.flatnonzero(column.given)
        rows = np.sort(random.permutation(rows)[:1000])
        lists = column.lists(rows.tolist(), separator)
        chosen = [draft.roles["entity"]] if "entity" in draft.roles else [name for name in columns if name != column.name]
        for name in chosen:
            other = columns[name]
            if other.is_list or other.is_binary:
                continue
            values = [other.text[int(row)].as_py() for row in rows]
            inside = [value in shown for value, shown in zip(values, lists, strict=True) if value is not None]
            if inside and np.mean(inside) > 0.6 and np.mean([len(shown) for shown in lists]) > 1.5:
                draft.take("candidates", column, f"lists that hold {name!r} of their row: what was shown")
                draft.candidates_separator = separator or None
                if "entity" not in draft.roles:
                    draft.take("entity", other, f"one of the list {column.name!r} in {np.mean(inside):.0%} of the rows: what was acted on")
                return


def _guess_ids(draft: Draft) -> None:
    for role, words, option in (("user", _USER, "--user"), ("entity", _ITEM, "--item")):
        columns = [column for column in draft.free() if not (column.is_list or column.is_temporal or column.is_binary) and column.distinct]
        if role in draft.roles:
            column = draft.sample.columns[draft.roles[role]]
        else:
            named = [column for column in columns if column.words & words]
            if named:
                # `user_id` rather than `user_age`, and of two such the one with more values.
                column = max(named, key=lambda column: (column.words <= words | _ID, bool(column.words & _ID), column.distinct))
                draft.take(role, column, "its name")
            else:
                ids = [column for column in columns if column.words & _ID or column.is_id or column.numbers is None]
                ids = [
                    column for column in ids if column.name != draft.roles.get("time") and column.distinct > 1 and column.time_unit is None
                ]
                if not ids:
                    found = ", ".join(draft.sample.columns)
                    raise DraftError(f"{draft.sample.path}: no column looks like the {role}'s id; name it with {option}. There: {found}")
                column = ids[0]
                draft.take(role, column, f"UNSURE: no name says it; the first column that may be an id. Another one: {option}")
        if role == "entity":
            draft.entity = next((word for word in sorted(column.words & _ITEM)), "item")


def _guess_actions(draft: Draft) -> None:
    free = draft.free()
    flags = [column for column in free if column.is_binary and _acts(column.words)]
    events = [
        column
        for column in free
        if column.words & _EVENT
        and not column.words & {"id", "time"}
        and column.numbers is None
        and 1 <= column.distinct <= 40
        and not column.is_list
    ]
    ratings = [column for column in free if column.words & _RATING and column.numbers is not None and 2 < column.distinct <= 100]
    if events:
        _from_events(draft, min(events, key=lambda column: (not _acts(_all_words(column.coded[1])), column.distinct)))
    elif flags:
        _from_flags(draft, flags)
    elif ratings and "candidates" not in draft.roles:
        _from_ratings(draft, ratings[0])
    else:
        words = [word for name in (draft.roles["entity"], draft.roles.get("time", "")) for word in parts(name) if word in _ACTS]
        name = words[0] if words else "click"
        if "candidates" in draft.roles:
            draft.actions.append(Action("impression", "impression", 1.0))
        draft.actions.append(Action(name, "positive", 1.0))
        why = f"{draft.roles['entity']!r} says so" if words else "UNSURE: no column says which; call it what it is"
        draft.say("actions", name, f"one action only: every row; {why}")
    if not draft.positives:
        raise DraftError(f"{draft.sample.path}: nothing in it is a positive action ({', '.join(action.name for action in draft.actions)})")


def _from_events(draft: Draft, column: Sampled) -> None:
    codes, texts = column.coded
    counts = np.bincount(codes[codes >= 0], minlength=len(texts))
    names: set[str] = set()
    for text in column.texts:
        words = set(parts(text))
        kind = "impression" if words & _SHOWN else "negative" if _acts(words) & _NEGATIVE else "positive"
        if "candidates" in draft.roles and kind == "impression":
            continue
        name = free_name(text, names)
        draft.actions.append(Action(name, kind, counts[texts.index(text)] / draft.sample.rows, column.name, (text,)))
        draft.say("action", f"{name} ({kind})", f"{column.name} = {text!r} in {counts[texts.index(text)]:,} of {draft.sample.rows:,} rows")
    if "candidates" in draft.roles:
        draft.actions.insert(0, Action("impression", "impression", 1.0))


def _from_flags(draft: Draft, flags: list[Sampled]) -> None:
    names: set[str] = set()
    happened = np.zeros(draft.sample.rows, bool)
    found = []
    for column in flags:
        on = np.isin(column.coded[0], [n for n, text in enumerate(column.coded[1]) if text.lower() in ("1", "1.0", "true")])
        happened |= on
        name = free_name("_".join(parts(column.name, without={"is", "has", "did"})), names)
        kind = "negative" if _acts(set(parts(name))) & _NEGATIVE else "positive"
        found.append(Action(name, kind, float(on.mean()), column.name))
        draft.say("action", f"{name} ({kind})", f"{column.name} is 1 in {on.mean():.2%} of the rows")
    if not happened.all() or len(flags) > 1:
        draft.actions.append(Action("impression", "impression", 1.0))
        draft.say(
            "action", "impression (impression)", f"every row: {(~happened).mean():.1%} of them have no action, so they were only shown"
        )
    draft.actions += found


def _from_ratings(draft: Draft, column: Sampled) -> None:
    numbers = column.numbers
    assert numbers is not None
    least = round(0.8 * float(np.nanmax(numbers)), 2)
    liked = float((np.nan_to_num(numbers, nan=-np.inf) >= least).mean())
    draft.actions += [Action("rated", "impression", 1.0), Action("like", "positive", liked, column.name, None, least)]
    draft.say(
        "actions", "rated, like", f"{column.name} goes to {np.nanmax(numbers):g}: a like is {least:g} or more ({liked:.0%} of the rows)"
    )
    draft.roles["value"] = column.name


def _guess_request(draft: Draft) -> None:
    if not draft.has_shown:
        return
    for column in draft.free() if "candidates" not in draft.roles else ():
        if column.words & _REQUEST and column.words & _ID and column.distinct < draft.sample.rows:
            draft.take("request", column, "its name; rows of one value are one ranking")
            break
    for column in draft.free() if "candidates" not in draft.roles else ():
        if column.words & _POSITION and column.is_integer and column.distinct < 1000:
            draft.take("position", column, "its name")
            break
    for column in draft.free():
        if column.words & _SURFACE and 1 < column.distinct <= _VOCABULARY_MAX and not column.is_list:
            draft.take("surface", column, f"its name, and its {column.distinct} values: where things are shown")
            break


def _guess_value(draft: Draft) -> None:
    if "value" in draft.roles:
        return
    for word in _VALUE:
        for column in draft.free():
            if word in column.words and column.numbers is not None and not column.is_binary and column.distinct > 2:
                if word == "price" and draft.has_shown:
                    continue  # of what was shown: a feature
                draft.take("value", column, "its name: a number that an action carries; a model sees it of past actions only")
                return


def _guess_feature(draft: Draft, column: Sampled) -> None:
    sample = draft.sample
    user, entity = (sample.columns[draft.roles[role]] for role in ("user", "entity"))
    if column.distinct < 2:
        return draft.left_out.append((column.name, "one value only"))
    if (
        column.time_unit is not None
        or column.words & {"hourmin"}
        or (column.words & {"date", "dt", "day", "month", "year"} and column.distinct > 2)
    ):
        return draft.left_out.append((column.name, "a time or date; the model is told ages"))
    if column.is_binary and draft.has_shown and parts(column.name)[0] in ("is", "has", "did"):
        return draft.left_out.append((column.name, "0 or 1, known to no list of actions; it may be told only after the request"))
    if column.distinct > 0.9 * sample.rows and sample.rows > 50 and not column.is_list:
        return draft.left_out.append((column.name, "another value in nearly every row: an identity, or free text"))
    codes = column.coded[0]
    most = np.bincount(codes[codes >= 0]).max() / max(int((codes >= 0).sum()), 1)
    if most > 0.98:
        return draft.left_out.append((column.name, f"one value in {most:.1%} of the rows: it would tell little, or what happened then"))
    of_item, items = column.share_constant_in(entity)
    of_user, users = column.share_constant_in(user)
    side, why = "request", "changes for a user and for an item; known when a ranking is asked for? If not, leave it out"
    if items >= 20 and of_item >= 0.98 and "candidates" not in draft.roles:
        side, why = "item", f"one value for {of_item:.1%} of the items"
    elif users >= 20 and of_user >= 0.98:
        side, why = "user", f"one value for {of_user:.1%} of the users"
    elif column.words & _OUTCOME:
        return draft.left_out.append((column.name, "its name: it may be known only after the request"))
    elif column.words & _ID and column.distinct > _VOCABULARY_MAX:
        return draft.left_out.append((column.name, "an identity that changes with what was done; it may be known only after the request"))
    elif _is_number(column):
        if not draft.has_shown or "candidates" in draft.roles or not column.words & _PRICE:
            return draft.left_out.append((column.name, "a number that changes; it may be known only after the request"))
        side, why = "candidate", "a number of the moment, by its name"
    if side in draft.tables:
        return draft.left_out.append((column.name, f"{why}: it belongs into {draft.tables[side].file}"))
    keys, what = _kind(column)
    name = free_name(column.name, {feature.name for feature in draft.features} | (_FIXED if side in ("request", "candidate") else set()))
    draft.features.append(FeatureGuess(name, column.name, side, keys))
    return draft.say("feature", f"{name} ({side}, {keys['kind']})", f"{why}; {what}")


def _guess_table(draft: Draft, side: str, of_log: Sampled, path: Path) -> None:
    """The features of a file with a row for each item or user."""
    folder = draft.sample.path.resolve().parent
    if not path.resolve().is_relative_to(folder):
        raise DraftError(f"{path}: must be in the log's folder {folder}, or below it")
    sample = read_sample(path)
    words = _USER if side == "user" else _ITEM
    alike = [column for name, column in sample.columns.items() if name == of_log.name]
    named = [column for column in sample.columns.values() if column.words & _ID and column.words <= words | _ID]
    identity = next(iter((*alike, *named)), next(iter(sample.columns.values())))
    draft.tables[side] = Table(sample, identity.name, str(path.resolve().relative_to(folder)))
    draft.say(f"{side}s", path.name, f"one row for each {side}, by {identity.name!r}")
    for column in sample.columns.values():
        repeated = max(np.bincount(column.coded[0][column.coded[0] >= 0], minlength=1)) > 1
        if (
            column is identity
            or column.distinct < 2
            or column.time_unit is not None
            or not (repeated or _is_number(column) or column.is_list)
        ):
            draft.left_out += (
                [] if column is identity else [(f"{path.name}: {column.name}", "one value only, a time, or another in every row")]
            )
            continue
        keys, what = _kind(column)
        name = free_name(column.name, {feature.name for feature in draft.features})
        draft.features.append(FeatureGuess(name, column.name, side, keys))
        draft.say("feature", f"{name} ({side}, {keys['kind']})", f"{path.name}: {what}; was it known before the log's first request?")


def _is_number(column: Sampled) -> bool:
    coded = column.words & (_ID | {"type", "region", "country", "group", "category", "zip", "class", "level", "os", "device"})
    numbers = column.numbers
    if numbers is None or coded:
        return False
    return column.distinct > 50 or bool(np.mod(numbers[~np.isnan(numbers)], 1).any())  # a few whole numbers are codes


def _kind(column: Sampled) -> tuple[dict[str, object], str]:
    """kind and its keys, and why."""
    if _is_number(column):
        numbers = column.numbers
        assert numbers is not None
        wide = np.nanmin(numbers) >= 0 and np.nanmax(numbers) > 100 * max(np.nanmedian(numbers), 1e-9)
        return {"kind": "number", "normalise": "log"} if wide else {"kind": "number"}, f"{column.distinct:,} numbers"
    if (dimension := column.vector_dimension) is not None and 1 <= dimension <= 256:
        return {"kind": "vector", "dimension": dimension}, f"{dimension} numbers in every row"
    separator = "" if column.is_list else column.list_separator()
    if separator is not None:
        lists = column.lists(np.flatnonzero(column.given)[:5000].tolist(), separator)
        values = {value for each in lists for value in each}
        length = min(max(map(len, lists)), 8)
        keys: dict[str, object] = {"kind": "list", "hash_buckets": _buckets(len(values)), "length_max": length}
        return keys | ({"separator": separator} if separator else {}), f"lists of {len(values):,} values"
    if column.distinct <= _VOCABULARY_MAX:
        texts = sorted(column.texts, key=lambda text: (len(text), text))
        return {"kind": "category", "vocabulary": texts, "dimension": 4}, f"{column.distinct} values"
    return {"kind": "category", "hash_buckets": _buckets(column.distinct)}, f"{column.distinct:,} values"


def _buckets(distinct: int) -> int:
    """Four times as many buckets as values, so that few share one."""
    return min(max(64, 1 << (4 * distinct - 1).bit_length()), 4_000_000)


def _all_words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in parts(text)}


def _acts(words: Iterable[str]) -> set[str]:
    """Words that are actions: like, likes, liked."""
    return {
        stem for word in words for stem in (word, word.removesuffix("s"), word.removesuffix("ed"), word.removesuffix("d")) if stem in _ACTS
    }
