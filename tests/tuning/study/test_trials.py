"""Trials by their ids."""

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.learn.run_folder import BEST, LAST
from raytune_emotion.storage.locations import Folder, Remote
from raytune_emotion.tuning.study.trials import describe_ids, find_trial, trial_id_of, trials_with


def test_a_number_is_an_id():
    assert [find_trial(text, ["0002", "0012"], "s") for text in ("2", "0002", "12")] == ["0002", "0002", "0012"]


@pytest.mark.parametrize("text", ["9", "0009", "x", "../0002", "", "²", "9" * 5000])
def test_a_trial_that_is_not_there_is_refused_with_those_that_are(text):
    with pytest.raises(UserError) as caught:
        find_trial(text, ["0000", "0001", "0002"], "results/first")
    assert str(caught.value) == f"results/first: no trial {text}; there are 0000 to 0002"


def test_trials_are_in_the_order_of_their_numbers():
    known = {*map(trial_id_of, range(10_002)), "a copy"}
    with pytest.raises(UserError, match=r"; there are 0000 to 10001$"):
        find_trial("10002", known, "results/first")
    assert find_trial("10001", known, "results/first") == "10001"


def test_trials_whose_folder_is_a_link_are_found(tmp_path):
    for trial_id in ("0002", "0000", "0001"):
        (tmp_path / "elsewhere" / trial_id).mkdir(parents=True)
        (tmp_path / "elsewhere" / trial_id / (BEST if trial_id != "0001" else LAST)).touch()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "trials").symlink_to(tmp_path / "elsewhere")
    assert trials_with(Folder(tmp_path / "study"), BEST) == ["0000", "0002"]
    assert trials_with(Remote((tmp_path / "study").as_uri()), BEST) == ["0000", "0002"]
    assert trials_with(Folder(tmp_path / "no study"), BEST) == []


def test_trials_are_named_by_the_ends_of_a_row():
    assert describe_ids(["0000", "0001", "0002", "0003"]) == "there are 0000 to 0003"
    assert describe_ids(["0000", "0002", "0003"]) == "there are 0000, 0002, 0003"
    assert describe_ids([trial_id_of(2 * i) for i in range(11)]) == "there are 11 from 0000 to 0020"
    assert describe_ids(["0000"]) == "there are 0000"
    assert describe_ids([]) == "no trial has begun"
