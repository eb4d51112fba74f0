"""Changes to what routing knows: the operator's, and those that discovery finds.

A change is written in one transaction; routing gets a new snapshot after the COMMIT. When the transaction fails nothing
in memory has changed, so the next change starts from what the database really holds. Changes run one after the other:
each snapshot is read by the transaction that made the change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from config.catalog_files import CatalogFiles
from records.connection import Connection
from records.database import Store
from records.keys import judge_keys, sync_environment_keys, sync_file_keys
from records.models import Snapshot, load_snapshot, sync_models
from router import Router
from routing.catalog import Model
from routing.clients import ClientKeys

T = TypeVar("T")


class Control:
    """Owns the catalogue files in force and the client keys; alone loads snapshots into the router."""

    def __init__(self, files: CatalogFiles, store: Store, router: Router, changed: Callable[[], None]) -> None:
        """`changed` is called after each change, for requests that wait for a route."""
        self.files = files
        self.clients = ClientKeys()
        self._changed = changed
        self._store = store
        self._router = router
        self._one_at_a_time = asyncio.Lock()
        self._tell: Callable[[], None] | None = None

    def shared_with(self, tell: Callable[[], None]) -> None:
        """Tell other gateways of the operator's changes, too."""
        self._tell = tell

    async def reload(self) -> None:
        """Another gateway, which may use the same database, has changed something."""
        async with self._one_at_a_time:
            await self._commit(lambda db: None, self.files)

    def start(self) -> None:
        """Bring catalogue and keys into the database and route by what is there. Before there is an event loop."""

        def sync(db: Connection) -> Snapshot:
            vault, keys = self._store.vault, self.files.keys
            of_files = [(k.platform, k.secret, k.label, k.trains_on_prompts) for k in keys if not k.env]
            of_environment = [(k.platform, k.secret, k.label) for k in keys if k.env]
            sync_models(db, self.files.models)
            sync_file_keys(db, vault, of_files)
            sync_environment_keys(db, vault, of_environment)
            return self._snapshot(db, self.files)

        snapshot = self._store.write_now(sync)
        self._router.load(snapshot.catalog, snapshot.key_status)
        self.clients.load(snapshot.clients)

    async def apply(self, change: Callable[[Connection], T]) -> T:
        """Make an operator's change, all of it or nothing; it holds from the next request on."""
        async with self._one_at_a_time:
            result = await self._commit(change, self.files)
        if self._tell is not None:
            self._tell()
        return result

    async def revise_models(self, revise: Callable[[Sequence[Model]], Sequence[Model]]) -> bool:
        """Put other models into the catalogue; gives whether that was a change."""
        async with self._one_at_a_time:
            models = tuple(revise(self.files.models))
            if models == self.files.models:
                return False
            await self._commit(lambda db: sync_models(db, models), replace(self.files, models=models))
            return True

    async def _commit(self, change: Callable[[Connection], T], files: CatalogFiles) -> T:
        def changed(db: Connection) -> tuple[T, Snapshot]:
            return change(db), self._snapshot(db, files)

        before = dict(self._router.key_status)
        result, snapshot = await self._store.write(changed)
        # A status that requests have changed since the transaction began is newer than the one it read.
        newer = {id: status for id, status in self._router.key_status.items() if before.get(id) is not status}
        status = {id: newer.get(id, read) for id, read in snapshot.key_status.items()}
        self.files = files
        self._router.load(snapshot.catalog, status)
        self.clients.load(snapshot.clients)
        self._changed()
        return result

    def _snapshot(self, db: Connection, files: CatalogFiles) -> Snapshot:
        judge_keys(db, self._store.vault, files.platforms)
        return load_snapshot(db, self._store.vault, files.platforms, files.models, files.aliases)
