"""What `freshrank bench feast` sends and counts, against a real HTTP server: a join is both answers, whole."""

import asyncio
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web

from deploy import bench_feast
from deploy.load import Load
from features.domain import load_domain

DOMAIN = load_domain(bench_feast._SCRIPTS.parents[2] / "domains" / "simulator.toml")


def test_the_views_have_the_columns_of_the_tables_and_joins_ask_for_all_of_them(tmp_path):
    bench_feast.write_views(tmp_path, DOMAIN)
    schemas = {side: pq.read_schema(tmp_path / f"{side}.parquet") for side in ("item", "user")}
    assert schemas["item"].names == ["item", "event_timestamp", "shelf", "tags", "rating", "price", "embedding"]
    assert schemas["user"].names == ["user", "event_timestamp", "declared_interest", "activity", "embedding"]
    assert schemas["item"].field("tags").type == pa.list_(pa.int64())
    items = pq.read_table(tmp_path / "item.parquet")
    assert (items.num_rows, len(items["embedding"][0])) == (bench_feast.ITEMS, DOMAIN.ranker["home"].embedding_dimension)
    of_items, of_user = map(json.loads, bench_feast._joins(np.random.default_rng(1), DOMAIN)[0].split(b"\n"))
    assert of_items["features"] == [f"item_features:{name}" for name in schemas["item"].names[2:]]
    assert of_user["features"] == [f"user_features:{name}" for name in schemas["user"].names[2:]]
    assert (len(set(of_items["entities"]["item"])), len(of_user["entities"]["user"])) == (100, 1)


def test_a_join_is_ok_when_both_answers_are_whole():
    async def run():
        answers = {b"1": (200, "PRESENT"), b"2": (200, "NOT_FOUND"), b"3": (500, "PRESENT")}

        async def answer(request):
            status, text = answers[await request.read()]
            return web.Response(status=status, text=text)

        app = web.Application()
        app.router.add_post("/get-online-features", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"127.0.0.1:{runner.addresses[0][1]}"
        caller = bench_feast.FeastCaller(Load(address, (b"1\n1", b"1\n2", b"3\n1"), 0, 0, timeout_s=5.0))
        try:
            await caller.open()
            found = [await caller.send(i) for i in range(3)]
            await runner.cleanup()
            return [*found, await caller.send(0)]
        finally:
            await caller.close()
            await runner.cleanup()

    *found, gone = asyncio.run(run())
    assert found == ["OK", "INCOMPLETE", "INCOMPLETE"]
    assert gone == "ClientConnectorError"
