"""JSON schemas as regular expressions: the part of JSON Schema that describes a regular language, and no other.

`outlines_core` writes the expression. It passes over keywords that it does not know (`minimum`, `uniqueItems`), so
every keyword is checked here first: what an answer is said to be valid under, it is valid under.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

_NOTES = {"title", "description", "$comment", "examples", "default", "$schema", "$id", "deprecated", "readOnly"}
# The package stops at the first match, a in a|ab. Before a last character that no text has, a match is a whole text.
LAST = "\U0010ffff"
_SCALARS = ("string", "integer", "number", "boolean", "null")
# The package's expressions for dates and times let through days and characters that are none.
_FORMATS = ("uuid",)
_OWN = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}


def schema_regex(schema: Any) -> str:
    """The expression that every text in JSON matches which is valid under a schema, in the order of its properties.

    Between the parts there may be one space.

    Raises:
        ValueError: it uses a keyword that is not supported, with its place in the schema, or the package is missing.
    """
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        raise ValueError(
            "sampler.constraint.json_schema needs outlines_core: pip install 'denoise-rl[constraints]'"
        ) from None
    schema = copy.deepcopy(schema)
    _check(schema, schema, "$", ())
    try:
        return build_regex_from_schema(json.dumps(schema))
    except ValueError as error:
        raise _refuse("$", f"cannot be compiled: {str(error).splitlines()[0]}") from None


def _refuse(where: str, reason: str) -> ValueError:
    return ValueError(f"sampler.constraint.json_schema: {where} {reason}")


def _check(schema: Any, root: Any, where: str, inside: tuple[str, ...]) -> None:
    """Raise ValueError unless the expression will say what the schema says; patterns are put into brackets.

    Args:
        inside: the references that led here: one that leads to itself describes no regular language.
    """
    if not isinstance(schema, dict):
        raise _refuse(where, f"is {schema!r} and must be a schema with a type")
    given = set(schema) - _NOTES - ({"$defs", "definitions"} if where == "$" else set())
    if "$ref" in given:
        name = schema["$ref"]
        if given != {"$ref"}:
            raise _refuse(where, "has keywords beside $ref: leave them out")
        if name in inside:
            raise _refuse(where, f"refers to itself by {name}: it nests without bound and is no regular language")
        return _check(_referred(root, name, where), root, name, (*inside, name))
    if "anyOf" in given:
        if given != {"anyOf"}:
            raise _refuse(where, "has keywords beside anyOf: put them into its parts")
        for number, part in enumerate(schema["anyOf"]):
            _check(part, root, f"{where}.anyOf[{number}]", inside)
        return None
    if "enum" in given or "const" in given:
        values = schema["enum"] if "enum" in given else [schema["const"]]
        if len(given) > 1 or any(isinstance(value, list | dict) for value in values):
            raise _refuse(where, "must be enum or const alone, of texts, numbers, booleans and null")
        return None
    if "type" not in given:
        raise _refuse(where, f"has no type, and uses {', '.join(sorted(given)) or 'nothing'}: set its type")
    kind = schema["type"]
    if kind not in (*_SCALARS, *_OWN):
        raise _refuse(where, f"has type {kind!r}: set one of {', '.join((*_SCALARS, 'array', 'object'))}")
    unknown = sorted(given - {"type"} - _OWN.get(kind, set()))
    if unknown:
        raise _refuse(where, f"uses {unknown[0]}, which no automaton checks here: leave it out")
    if kind == "string":
        _check_string(schema, where)
    elif kind == "array":
        _check_array(schema, root, where, inside)
    elif kind == "object":
        _check_object(schema, root, where, inside)
    return None


def _referred(root: Any, name: Any, where: str) -> Any:
    found = root
    for part in str(name).removeprefix("#/").split("/"):
        if not str(name).startswith("#/") or not isinstance(found, dict) or part not in found:
            raise _refuse(where, f"refers to {name!r}, which is not in the schema")
        found = found[part]
    return found


def _check_string(schema: dict[str, Any], where: str) -> None:
    ways = [way for way in ({"minLength", "maxLength"}, {"pattern"}, {"format"}) if way & set(schema)]
    if len(ways) > 1:
        raise _refuse(where, "may have a length, a pattern or a format, one of them")
    if schema.get("format", "uuid") not in _FORMATS:
        raise _refuse(where, f"has format {schema['format']!r}: set one of {', '.join(_FORMATS)}, or a pattern")
    if "pattern" in schema:
        from outlines_core import Index, Vocabulary

        # The pattern must not reach out of its quotes.
        pattern = schema["pattern"].removeprefix("^")
        # An anchor at the end goes; a dollar behind an odd number of backslashes is the character.
        if re.search(r"(?<!\\)(\\\\)*\$$", pattern):
            pattern = pattern[:-1]
        schema["pattern"] = f"(?:{pattern})"  # The package writes it as it is, and a | would end its quotes.
        every = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
        try:
            edges = Index(f"(?:{pattern}){LAST}", every).get_transitions()
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise _refuse(where, f"has pattern {pattern!r}, which cannot be compiled: {reason}") from None
        used = {token for own in edges.values() for token in own} - {256}
        if used & {*range(32), ord('"'), ord("\\")}:
            raise _refuse(where, f'has pattern {pattern!r}, which allows ", \\ or a control character: exclude them')


def _check_array(schema: dict[str, Any], root: Any, where: str, inside: tuple[str, ...]) -> None:
    if "prefixItems" in schema:
        if set(schema) & {"items", "minItems", "maxItems"}:
            raise _refuse(where, "has prefixItems and other keywords on items: leave one of them out")
        for number, part in enumerate(schema["prefixItems"]):
            _check(part, root, f"{where}.prefixItems[{number}]", inside)
    elif "items" not in schema:
        raise _refuse(where, "is an array of anything: set items")
    else:
        _check(schema["items"], root, f"{where}.items", inside)


def _check_object(schema: dict[str, Any], root: Any, where: str, inside: tuple[str, ...]) -> None:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not properties:
        raise _refuse(where, "is an object without properties: name them")
    missing = sorted(set(required) - set(properties))
    if missing:
        raise _refuse(where, f"requires {missing[0]!r}, which is none of its properties")
    if schema.get("additionalProperties", False) not in (False, True):
        raise _refuse(where, "has a schema for additionalProperties: name the properties")
    for name, part in properties.items():
        _check(part, root, f"{where}.{name}", inside)
