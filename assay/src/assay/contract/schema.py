"""JSON schemas of dataclasses, so that what is published is what is written. Standard library only.

`Annotated[type, {...}]` adds keywords to the schema of a field, as a description or a minimum. A field with ADDED may
be missing: it was added within a version, and earlier files have none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

DRAFT = "https://json-schema.org/draft/2020-12/schema"
ADDED = object()
_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}

Digest = Annotated[str, {"pattern": "^[0-9a-f]{16}$"}]
Count = Annotated[int, {"minimum": 0}]
Number = Annotated[int, {"minimum": 1}]
Positive = Annotated[float, {"exclusiveMinimum": 0}]


def document(name: str, title: str, description: str, models: Sequence[type], **more: Any) -> dict[str, Any]:
    """The schema of a file or a line that follows one of the models. `more`: keywords for types by their names."""
    definitions: dict[str, Any] = {}
    references = [_of(model, definitions, more) for model in models]
    root = definitions.pop(models[0].__name__) if len(models) == 1 else {"oneOf": references}
    head = {"$schema": DRAFT, "$id": name, "title": title, "description": description}
    return {**head, **root, "$defs": definitions}


def _of(kind: Any, definitions: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a type. Dataclasses go to `definitions`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = _of(arguments[0], definitions, more)
        for one in arguments[1:]:
            found |= {} if one is ADDED else more[one] if isinstance(one, str) else one
        return found
    if is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # a model may hold itself
            definitions[kind.__name__] = _model(kind, definitions, more)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [_of(one, definitions, more) for one in arguments]}
    if origin in (list, tuple):
        if origin is tuple and arguments[-1] is not Ellipsis:
            items = [_of(one, definitions, more) for one in arguments]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "items": _of(arguments[0], definitions, more)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions, more)}
    return {} if kind is Any else {"type": _SIMPLE[kind]}


def _model(kind: type, definitions: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in fields(kind)]
    return {
        "type": "object",
        "description": (kind.__doc__ or "").strip(),
        "additionalProperties": False,
        "required": [name for name in names if ADDED not in getattr(hints[name], "__metadata__", ())],
        "properties": {name: _of(hints[name], definitions, more) for name in names},
    }
