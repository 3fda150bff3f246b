"""Write the JSON Schema of search spaces, from the types of the settings and of the words."""

import json
from typing import Annotated, Any, Union

from pydantic import ConfigDict, Field, WithJsonSchema, conlist, create_model
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypeAliasType

from raytune_emotion.config import SETTINGS
from raytune_emotion.tuning.space.words import RANGES, value_type, word_types


class _WithoutTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """Make the JSON Schema of the format. Editors use it to complete and check spaces."""
    ranges = {word: _model(word, {word: (kind, ...)}) for word, kind in RANGES.items()}
    described: dict[str, Any] = {key: setting.default for key, setting in SETTINGS.items()}
    described["loss"] = Field("kl", description="one loss, or the weights of a mixture")
    settings, values, varying = {}, {}, {}
    for key, field in described.items():
        value, words = value_type(key), word_types(key)
        models = [ranges.get(word) or _model(f"{key} {word}", {word: (kind, ...)}) for word, kind in words.items()]
        setting: Any = Annotated[(Union[(value, *models)], Field(description=field.description))]
        settings[key] = (TypeAliasType(key.replace(".", " "), setting), field.default)
        values[key] = (value, field.default)
        if words:
            varying[key] = settings[key]
    condition = {"type": "object", "minProperties": 1, "propertyNames": {"enum": [*varying]}}
    entry = _model("entry", {"if": (Annotated[Any, WithJsonSchema(condition)], ...), **varying}, least=2)
    when: Any = Field([], description="settings that depend on a choice; the last entry that applies wins")
    start: Any = Field([], description="points that are tried first; settings that a point omits are sampled")
    point = _model("point", values, least=1)
    lists = {"when": (conlist(entry), when), "start": (conlist(point), start)}
    space = _model("Search space of raytune_emotion", {**settings, **lists})
    schema = space.model_json_schema(schema_generator=_WithoutTitles)
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def _model(name: str, fields: dict[str, Any], least: int = 0) -> Any:
    config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": least} if least else {})
    return create_model(name.replace(".", " "), __config__=config, **fields)


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
