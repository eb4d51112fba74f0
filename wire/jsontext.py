"""JSON as text, both directions: strict from clients, lenient from providers, with a limit on nesting."""

from __future__ import annotations

import json
import math
import re
from operator import is_
from typing import Any

import orjson

from wire.errors import InvalidRequest

BOM = b"\xef\xbb\xbf"
DEPTH_MAX = 200  # of JSON from either side: orjson reads 1024 levels but writes only 254, and some are put around it
ESCAPE = re.compile(rb"\\(?:u(?:[dD][89abAB]..\\u[dD][c-fC-F]..|([dD][89a-fA-F]..|0000))|.)", re.DOTALL)


def mended_escapes(raw: bytes) -> bytes:
    """Half an emoji (some editors cut them) and NUL become U+FFFD: they are not text, and servers refuse them."""
    return ESCAPE.sub(lambda found: b"\\ufffd" if found[1] else found[0], raw)


DATA_FIELDS = frozenset({"parameters", "schema", "input_schema", "arguments", "input"})  # where a null says something


def without_nulls(value: Any) -> Any:
    """JSON without what is null in it, apart from schemas and arguments: clients null what they do not set, and servers
    refuse that. The very object where there is nothing to leave out."""
    if type(value) is dict:
        kept = {k: v if k in DATA_FIELDS else without_nulls(v) for k, v in value.items() if v is not None}
        return value if len(kept) == len(value) and all(kept[k] is v for k, v in value.items()) else kept
    if type(value) is list:  # in which each has its place
        items = [without_nulls(item) for item in value]
        return value if all(map(is_, items, value)) else items
    return value


def plain_value(text: bytes) -> Any:
    """A value that can go on as the very text that it came as. Raises ValueError for one that is no JSON after all,
    nests too deeply or has a NUL in it."""
    value = orjson.loads(text)
    kind = type(value)
    if (kind is str and "\0" in value) or ((kind is list or kind is dict) and any(looked_over([value]))):
        raise ValueError
    return value


def looked_over(value: Any) -> tuple[bool, bool]:
    """Whether this nests deeper than DEPTH_MAX, which is more than could be written again or walked by a function that
    calls itself; and whether NUL is in one of its texts."""
    layer, has_nul = [value], False
    for _ in range(DEPTH_MAX):
        deeper = []
        for item in layer:
            for inner in item.values() if type(item) is dict else item:
                kind = type(inner)
                if kind is str:
                    has_nul = has_nul or "\0" in inner
                elif kind is dict or kind is list:
                    deeper.append(inner)
        if not deeper:
            return False, has_nul
        layer = deeper
    return True, has_nul


def nests_too_deeply(value: Any, brackets: int) -> bool:
    """The first of these; `brackets` is how many open in its JSON, which nearly always says it already."""
    return brackets > DEPTH_MAX and looked_over(value)[0]


def load_object(raw: bytes) -> dict[str, Any]:
    """The client's JSON object, strictly: orjson takes no NaN. Some put a byte-order mark before it."""
    raw = raw.removeprefix(BOM)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            body = orjson.loads(mended_escapes(raw))
        except orjson.JSONDecodeError:
            raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    too_deep, has_nul = looked_over(body)
    if too_deep:
        raise InvalidRequest(f"The body nests deeper than {DEPTH_MAX} levels.", code="invalid_json")
    return orjson.loads(mended_escapes(raw)) if has_nul else body


def no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def finite(text: str) -> float | None:
    """orjson, too, writes an infinite number as null."""
    value = float(text)
    return value if math.isfinite(value) else None


def load_lenient(raw: bytes) -> Any:
    """A provider's JSON. Python's own parser also takes half an emoji, which some put into each of two chunks.

    Raises ValueError for what is no JSON.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(raw, parse_constant=no_number, parse_float=finite)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    if len(raw) > 2 * DEPTH_MAX and nests_too_deeply(value, raw.count(b"{") + raw.count(b"[")):
        raise ValueError("nested too deeply")
    return value


def load_mended(raw: bytes) -> Any:
    """JSON with what servers get wrong about it: bytes that are no UTF-8, line ends in strings, numbers that are none.
    What is read so has to be written anew before it goes out.

    Raises ValueError for what is no JSON even so.
    """
    try:
        value = json.loads(raw.decode(errors="ignore"), strict=False, parse_constant=lambda _: None, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if nests_too_deeply(value, raw.count(b"{") + raw.count(b"[")):
        raise ValueError("nested too deeply")
    return value


def load_inner(text: str) -> Any:
    """JSON that stands as text in other JSON, such as a call's arguments; None for what is none."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return None if nests_too_deeply(value, text.count("{") + text.count("[")) else value


def dump(value: Any) -> bytes:
    """JSON of whatever `load_lenient` may have let in."""
    try:
        return orjson.dumps(value)
    except TypeError:  # lone surrogates
        return json.dumps(value, separators=(",", ":")).encode()


JSON = dict[str, Any]
