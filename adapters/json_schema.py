"""JSON schemas made acceptable to platforms that know only a part of the language.

A tool's parameters come from clients that write full JSON Schema; some platforms refuse a request for one keyword they
do not know. What cannot be said in the smaller language is left out: a looser schema still works. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wire.jsontext import JSON

DEPTH_MAX = 32  # of nested schemas; beyond it, and inside a recursive reference, anything goes
# The keywords that Gemini's `Schema` object has; what is not here answers 400.
GEMINI_KEYWORDS = frozenset(
    {
        "type", "format", "title", "description", "nullable", "enum", "items", "maxItems", "minItems", "properties",
        "required", "minProperties", "maxProperties", "minLength", "maxLength", "pattern", "anyOf", "minimum",
        "maximum", "default",
    }
)  # fmt: skip
STRING_FORMATS = frozenset({"enum", "date-time"})  # the only formats of strings it takes


def without_keys(schema: Any, names: frozenset[str]) -> Any:
    """A JSON schema without these keywords; inside `properties` every key is a name and stays."""
    if isinstance(schema, list):
        return [without_keys(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "properties" and isinstance(value, dict):
            kept[key] = {name: without_keys(item, names) for name, item in value.items()}
        elif key not in names:
            kept[key] = without_keys(value, names)
    return kept


def gemini_schema(schema: Mapping[str, Any]) -> JSON:
    """The schema in Gemini's subset: references inlined, one type each, unknown keywords gone."""
    return GeminiSchema(schema).cleaned(schema, 0)


class GeminiSchema:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._open: list[str] = []  # references being inlined, to notice one inside itself

    def cleaned(self, schema: object, depth: int) -> JSON:
        if not isinstance(schema, Mapping) or depth > DEPTH_MAX:
            return {}
        reference = schema.get("$ref")
        if isinstance(reference, str):
            return self._inlined(reference, schema, depth)
        schema = merged_all_of(schema)
        kept: JSON = {name: value for name, value in schema.items() if name in GEMINI_KEYWORDS}
        settle_type(kept)
        if "const" in schema and "enum" not in kept:
            kept["enum"] = [schema["const"]]
        alternatives = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(alternatives, list):
            settle_alternatives(kept, [self.cleaned(item, depth + 1) for item in alternatives if not is_null(item)])
            if any(map(is_null, alternatives)):
                kept["nullable"] = True
        self._settle_object(kept, schema, depth)
        if "items" in kept or kept.get("type") == "array":
            items = schema.get("items")
            kept["items"] = self.cleaned(items, depth + 1) or {"type": "string"}
            kept.setdefault("type", "array")
        settle_enum(kept)
        if kept.get("type") == "string" and kept.get("format") not in STRING_FORMATS:
            kept.pop("format", None)
        return kept

    def _inlined(self, reference: str, schema: Mapping[str, Any], depth: int) -> JSON:
        target: Any = self._root
        for step in reference.removeprefix("#").strip("/").split("/"):
            target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
        if reference in self._open or not isinstance(target, Mapping) or not reference.startswith("#/"):
            return {}
        self._open.append(reference)
        inlined = self.cleaned(target, depth + 1)
        self._open.pop()
        if isinstance(schema.get("description"), str):
            inlined["description"] = schema["description"]
        return inlined

    def _settle_object(self, kept: JSON, schema: Mapping[str, Any], depth: int) -> None:
        properties = schema.get("properties")
        if isinstance(properties, Mapping):
            kept["properties"] = {str(name): self.cleaned(item, depth + 1) for name, item in properties.items()}
            kept.setdefault("type", "object")
        if not kept.get("properties"):
            kept.pop("properties", None)
            kept.pop("required", None)
        elif "required" in kept:
            required = kept["required"] if isinstance(kept["required"], list) else []
            kept["required"] = [name for name in required if name in kept["properties"]]
            if not kept["required"]:
                del kept["required"]


def is_null(schema: object) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "null"


def merged_all_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """`allOf` is not in the subset; of its parts the properties and whatever the schema lacks are taken over."""
    parts = schema.get("allOf")
    if not isinstance(parts, list):
        return schema
    merged: JSON = {name: value for name, value in schema.items() if name != "allOf"}
    for part in parts:
        for name, value in part.items() if isinstance(part, Mapping) else ():
            if name == "properties" and isinstance(value, Mapping):
                merged["properties"] = {**value, **merged.get("properties", {})}
            elif name == "required" and isinstance(value, list):
                merged["required"] = [*merged.get("required", []), *value]
            else:
                merged.setdefault(name, value)
    return merged


def settle_type(kept: JSON) -> None:
    """One type and `nullable`, never a list of types."""
    kind = kept.get("type")
    if isinstance(kind, list):
        others = [name for name in kind if name != "null"]
        if "null" in kind:
            kept["nullable"] = True
        if others:
            kept["type"] = others[0]
        else:
            del kept["type"]


def settle_alternatives(kept: JSON, alternatives: list[JSON]) -> None:
    kept.pop("anyOf", None)
    usable = [item for item in alternatives if item]
    if len(usable) == 1:
        for name, value in usable[0].items():
            kept.setdefault(name, value)
    elif usable:
        kept["anyOf"] = usable
        kept.pop("type", None)


def settle_enum(kept: JSON) -> None:
    """Enums are of text only; an enum of anything else is left to the type."""
    values = kept.get("enum")
    if values is None:
        return
    if not isinstance(values, list):
        del kept["enum"]
        return
    if None in values:
        kept["nullable"] = True
    texts = [value for value in values if value is not None]
    if texts and all(isinstance(value, str) for value in texts) and kept.get("type", "string") == "string":
        kept["enum"], kept["type"] = texts, "string"
        return
    del kept["enum"]
    if "type" not in kept and texts:
        kinds = {bool: "boolean", int: "integer", float: "number"}
        kept["type"] = kinds.get(type(texts[0]), "string")
