"""Trials by their ids."""

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.tuning.study.trials import describe_ids, find_trial


def test_a_number_is_an_id():
    assert [find_trial(text, ["0002", "0012"], "s") for text in ("2", "0002", "12")] == ["0002", "0002", "0012"]


@pytest.mark.parametrize("text", ["9", "0009", "x", "../0002", "", "²"])
def test_a_trial_that_is_not_there_is_refused_with_those_that_are(text):
    with pytest.raises(UserError) as caught:
        find_trial(text, ["0000", "0001", "0002"], "results/first")
    assert str(caught.value) == f"results/first: there is no trial {text}; there are 0000 to 0002"


def test_trials_are_named_by_the_ends_of_a_row():
    assert describe_ids(["0000", "0001", "0002", "0003"]) == "there are 0000 to 0003"
    assert describe_ids(["0000", "0002", "0003"]) == "there are 0000, 0002, 0003"
    assert describe_ids(["0000"]) == "there are 0000"
    assert describe_ids([]) == "no trial has begun"
