"""JSON that may be anything."""

import json

import pytest

from raytune_emotion.storage.json_text import is_number, load_json


def test_values_are_read():
    assert load_json(b'{"a": [1, null, "x"]}') == load_json('{"a": [1, null, "x"]}') == {"a": [1, None, "x"]}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "nothing", b"\xff"])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        load_json(text)


def test_json_itself_fails_otherwise_where_values_are_nested():
    with pytest.raises(RecursionError):
        json.loads("[" * 100_000)


@pytest.mark.parametrize("value", [True, None, "1", float("nan"), float("-inf"), 10**400, [1]])
def test_what_no_float_can_hold_is_no_number(value):
    assert not is_number(value)
    assert is_number(-3)
    assert is_number(10**300)
