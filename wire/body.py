"""A chat body of which long fields may stay the text they came as.

An agent sends its whole conversation and all its tools with every request, a hundred kilobytes and more. Where nothing
in them has to change they are not even made into objects: what goes out is the text that came in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import orjson


class Body(Mapping[str, Any]):
    """A body like any other, read only. Fields that came as text are read when somebody looks into them, once."""

    __slots__ = ("_fields", "_texts")

    def __init__(self, fields: dict[str, Any], texts: Mapping[str, bytes]) -> None:
        """A field may be given as value, as text, or as both. The texts are JSON that orjson can read."""
        self._fields = fields
        self._texts = texts

    def as_sent(self, read: Collection[str]) -> dict[str, Any]:
        """The fields to be written as JSON; those that are there as text stay text, apart from these."""
        sent = dict(self._fields)
        for name, text in self._texts.items():
            sent[name] = self[name] if name in read else orjson.Fragment(text)
        return sent

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields and name in self._texts:
            self._fields[name] = orjson.loads(self._texts[name])
        return self._fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Mapping's own raises and catches for what is not there, as most names are."""
        return self[name] if name in self._fields or name in self._texts else default

    def __contains__(self, name: object) -> bool:
        return name in self._fields or name in self._texts

    def __iter__(self) -> Iterator[str]:
        yield from self._fields
        yield from self._texts.keys() - self._fields.keys()

    def __len__(self) -> int:
        return len(self._fields.keys() | self._texts.keys())
