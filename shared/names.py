"""What gateways call models and keys among each other. Each has numbers of its own for them, and no key ever leaves."""

from __future__ import annotations

from hashlib import blake2b

from router import Router
from routing.catalog import Catalog, Key

KEYLESS_NAME = "-"


def key_name(key: Key) -> str:
    """The same wherever the key is the same, and nothing to learn from: providers' keys are long and random."""
    if not key.id:
        return KEYLESS_NAME
    return blake2b(f"{key.platform}\0{key.secret}".encode(), digest_size=12, person=b"freeway").hexdigest()


class Names:
    """Names by number and numbers by name, of the catalogue in force."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._catalog: Catalog | None = None
        self._key_names: dict[int, str] = {}
        self._keys: dict[str, int] = {}
        self._models: dict[str, int] = {}

    def model(self, id: int) -> str | None:
        model = self._router.catalog.by_id.get(id)
        return None if model is None else model.label

    def key(self, id: int) -> str | None:
        self._refresh()
        return self._key_names.get(id)

    def model_id(self, name: str) -> int | None:
        self._refresh()
        return self._models.get(name)

    def key_id(self, name: str) -> int | None:
        self._refresh()
        return self._keys.get(name)

    def pair(self, key: int, model: int) -> str | None:
        """A key for a model, as one name; None when either is gone."""
        key_name, model_name = self.key(key), self.model(model)
        return None if key_name is None or model_name is None else f"{key_name}:{model_name}"

    def _refresh(self) -> None:
        if self._catalog is (catalog := self._router.catalog):
            return
        self._catalog = catalog
        keys = [key for keys in catalog.keys.values() for key in keys]
        self._key_names = {key.id: key_name(key) for key in keys} | {0: KEYLESS_NAME}
        self._keys = {name: id for id, name in self._key_names.items()}
        self._models = {model.label: model.id for model in catalog.models}
