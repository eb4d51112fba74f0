"""A hostile day: whoever sends too much, too slowly, for ever, or nothing at all, harms nobody else.

What takes long or needs the machine for itself is in bench/hostile.py.
"""

from __future__ import annotations

import asyncio

from store import Row, Store


async def test_a_row_that_no_database_can_hold_keeps_no_other_from_being_written(tmp_path):
    store = Store(tmp_path / "x.db", None)
    store.log(Row("good 1", 0.0))
    store.log(Row("too large a number", 0.0, output_tokens=10**300))
    store.log(Row("half an emoji", 0.0, error="\ud83d"))
    store.log(Row("good 2", 0.0))

    await store.flush()
    await asyncio.sleep(0)

    assert await store.read(lambda db: [id for (id,) in db.execute("SELECT request_id FROM requests")]) == [
        "good 1",
        "good 2",
    ]
    assert (store.pending, store.dropped) == (0, 2)
    await store.close()
