"""Which embedding models can stand in for one another.

Vectors of two models have nothing to do with each other: an index that gets some of each is spoilt, and nobody notices.
So a request stays within one family, whatever fails (SPEC 17.1), and `auto` means the same family every time, not the
one that happens to be free. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from routing.catalog import Catalog, Model
from wire.chat import ModelKind, Need


def same_vectors(catalog: Catalog, need: Need, routable: Callable[[Model], bool]) -> tuple[list[Model], list[Model]]:
    """The models asked for by name, and the others whose vectors are the same. Raises ModelNotFound."""
    if need.pinned is None:
        first = next(filter(routable, catalog.auto_embeddings), None)
        return [], alike(first, catalog.auto_embeddings) if first is not None else []
    asked = named(catalog, need.pinned, ModelKind.EMBEDDING)
    others = [] if need.strict else [m for m in alike(asked[0], catalog.auto_embeddings) if m not in asked]
    return alike(asked[0], asked), others


def named(catalog: Catalog, name: str, kind: ModelKind) -> list[Model]:
    """The enabled models of this name. An embedding's may also be a family's, because one model has other ids
    elsewhere. Raises ModelNotFound."""
    if kind is not ModelKind.EMBEDDING:
        return catalog.resolve(name, kind)
    if catalog.known_as(name) is None and (family := [m for m in catalog.embeddings if m.family == name]):
        return family
    return catalog.resolve(name, kind)


def alike(first: Model, models: Iterable[Model]) -> list[Model]:
    """Of these the models whose vectors are this one's: of one family, and as far as is known of one length."""
    known = first.dimensions
    return [m for m in models if m.family == first.family and (known is None or m.dimensions in (known, None))]
