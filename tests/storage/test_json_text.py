"""JSON that may be anything."""

import json

import pytest

from raytune_emotion.storage.json_text import are_settings, is_number, load_json


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


def test_settings_are_plain_values_and_weights_of_losses_are_numbers():
    assert are_settings({"optim.lr": 1e-3, "model.pretrained": True, "data.classes": ["sad"], "loss.kl": 1, "x": None})
    for wrong in ({"loss.kl": "1"}, {"loss.kl": None}, {"optim.lr": 10**400}, {"x": [[1]]}, {"x": {}}, {1: 1}, []):
        assert not are_settings(wrong)
