"""JSON against the schemas of the OpenAPI document: as much of JSON Schema as that uses."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "array": (list,), "object": (dict,), "null": (type(None),),
}  # fmt: skip
_KNOWN = {
    "type", "properties", "required", "items", "anyOf", "enum", "const", "minimum", "maximum",
    "minItems", "maxItems", "$ref",
}  # fmt: skip


def complaints(value: Any, schema: Schema, root: Schema, place: str = "$") -> Iterator[str]:
    """What of the value is not as the schema says; nothing when all is well."""
    unknown = set(schema) - _KNOWN
    assert not unknown, f"the document uses {unknown}"
    if "$ref" in schema:
        yield from complaints(value, resolve(schema["$ref"], root), root, place)
        return
    if "anyOf" in schema:
        found = [list(complaints(value, one, root, place)) for one in schema["anyOf"]]
        if all(found):
            yield from found[0]
        return
    if not _is_of_type(value, schema.get("type")):
        yield f"{place} is {type(value).__name__}, not {schema['type']}"
        return
    yield from _values(value, schema, place)
    if isinstance(value, dict):
        yield from (f"{place}.{n} is missing" for n in schema.get("required", ()) if n not in value)
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                yield from complaints(value[name], inner, root, f"{place}.{name}")
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from complaints(item, schema["items"], root, f"{place}[{index}]")


def resolve(reference: str, root: Schema) -> Schema:
    """`#/components/schemas/…`."""
    found: Any = root
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    schema: Schema = found
    return schema


def _is_of_type(value: Any, wanted: Any) -> bool:
    if wanted is None:
        return True
    names = [wanted] if isinstance(wanted, str) else wanted
    return any(_is(value, name) for name in names)


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])


def _values(value: Any, schema: Schema, place: str) -> Iterator[str]:
    if "const" in schema and value != schema["const"]:
        yield f"{place} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is none of {schema['enum']}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if not low <= value <= high:
            yield f"{place} is not between {low} and {high}"
    if isinstance(value, list):
        low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if not low <= len(value) <= high:
            yield f"{place} has {len(value)} items"
