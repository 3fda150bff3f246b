"""Write the JSON Schema of search spaces, from the tree of settings."""

import json
from typing import Any

from pydantic import TypeAdapter

from raytune_emotion.config import SETTINGS, RunConfig
from raytune_emotion.tuning.space.parser import NEVER_SEARCHED, RANGES, SECTIONS
from raytune_emotion.tuning.space.space import LOSSES


def json_schema() -> dict[str, Any]:
    """Make the JSON Schema of the format from the tree of settings. Editors use it to complete and check spaces."""
    tree = TypeAdapter(RunConfig).json_schema()["$defs"]
    definitions: dict[str, Any] = {word: _range_schema(word) for word in RANGES}
    for key in SETTINGS:
        section, _, name = key.partition(".")
        value = dict(tree[SECTIONS[section].__name__]["properties"][name])
        described = {"description": value.pop("description"), "default": value.pop("default", None)}
        del value["title"]
        reference = {"$ref": f"#/$defs/one {key}"}
        forms = [reference]
        if key not in NEVER_SEARCHED and not key.startswith("loss."):
            forms.append(_object({"choice": _list(reference)}))
            if value.get("type") in ("number", "integer") and key != "data.image_size":
                whole = value["type"] == "integer"
                forms += [{"$ref": f"#/$defs/{word}"} for word in RANGES if word.startswith("int") or not whole]
        definitions |= {f"one {key}": value, key: {**described, "anyOf": forms}}
    definitions["one loss"] = {"enum": list(LOSSES)}
    one_loss = {"$ref": "#/$defs/one loss"}
    mixture = _object({"simplex": _list(one_loss, least=2)})
    definitions["loss"] = {
        "description": "one loss, or the weights of a mixture",
        "anyOf": [one_loss, _object({"choice": _list(one_loss)}), mixture],
    }

    settings = {key: {"$ref": f"#/$defs/{key}"} for key in ("loss", *SETTINGS)}
    varying = {key: ref for key, ref in settings.items() if key not in NEVER_SEARCHED and not key.startswith("loss.")}
    condition = {"type": "object", "minProperties": 1, "propertyNames": {"enum": list(varying)}}
    branch = {**_object({"if": condition, **varying}, required=["if"]), "minProperties": 2}
    point = _object({key: {"$ref": f"#/$defs/one {key}"} for key in settings}, required=[])
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Search space of raytune_emotion",
        **_object(
            {
                **settings,
                "when": {
                    "description": "settings that depend on a choice; the last entry that applies wins",
                    "type": "array",
                    "items": branch,
                },
                "start": {
                    "description": "points that are tried first; settings that a point omits are sampled",
                    "type": "array",
                    "items": {**point, "minProperties": 1},
                },
            },
            required=[],
        ),
        "$defs": definitions,
    }


def _object(properties: dict[str, Any], *, required: list[str] | None = None) -> dict[str, Any]:
    needed = list(properties) if required is None else required
    return {"type": "object", "required": needed, "additionalProperties": False, "properties": properties}


def _list(items: dict[str, Any], *, least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "uniqueItems": True}


def _range_schema(word: str) -> dict[str, Any]:
    items = {"type": "integer" if word.startswith("int") else "number"}
    most = 2 if "log" in word else 3
    return _object({word: {"type": "array", "items": items, "minItems": 2, "maxItems": most}})


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
