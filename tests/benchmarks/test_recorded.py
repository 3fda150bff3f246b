import dataclasses
import json

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import FixedTrial

from benchmarks.curves import recorded
from benchmarks.curves.recorded import read_recording
from benchmarks.curves.replay import CURVES, read_space
from benchmarks.judge import (
    DEFAULT,
    POLICIES,
    RANDOM,
    WITHOUT,
    Answers,
    Verdict,
    guide,
    mislead,
    portfolio_of_others,
    simulate,
)
from benchmarks.simulation import Simulation
from raytune_emotion.tuning.policy import freeze_thaw
from raytune_emotion.tuning.space.space import draw
from raytune_emotion.tuning.study.optuna_study import Searcher


@pytest.fixture(scope="module")
def recording():
    """What was recorded on real faces."""
    return read_recording(CURVES / "ferplus_small.parquet", read_space())


def test_a_table_of_anybody_says_the_same(recording, tmp_path):
    table = pd.read_parquet(CURVES / "ferplus_small.parquet")
    table = table.rename(columns={"configuration": "trial", "core_seconds": "seconds"})
    table.to_csv(tmp_path / "faces.csv", index=False)
    again = read_recording(tmp_path / "faces.csv", read_space())
    assert again.params == recording.params
    assert np.allclose(again.value_NR, recording.value_NR)
    assert np.allclose(again.seconds_NR, recording.seconds_NR)


def test_a_study_has_the_time_of_as_many_trials_as_are_named(recording):
    few = read_recording(CURVES / "ferplus_small.parquet", read_space(), trials=8)
    assert few.budget == pytest.approx(8 * recording.seconds_NR.sum(axis=1).mean())
    answers = Answers(few)
    for settings in [few.space.suggest(FixedTrial(dict(params))) for params in few.params[:8]]:
        assert answers.limits().new
        answers.respond(settings)
    assert not answers.limits().new
    assert recording.budget == pytest.approx(len(recording.params) / 4 * recording.seconds_NR.sum(axis=1).mean())


def test_a_study_begins_no_more_trials_than_are_recorded(recording):
    two = dataclasses.replace(recording, params=recording.params[:2], trials=3)
    answers = Answers(two)
    for params in two.params:
        assert answers.limits().new
        answers.respond(two.space.suggest(FixedTrial(dict(params))))
    assert not answers.limits().new


def test_a_study_on_recorded_curves_begins_with_the_portfolio_of_other_data(recording):
    assert portfolio_of_others(recording).recorded == ("drawn",)
    of_others = dataclasses.replace(recording, name="faces")
    assert portfolio_of_others(of_others).recorded == ("drawn", "ferplus_small")


def test_what_misleads_says_the_contrary_of_the_portfolio(recording):
    settings = [*draw(recording.space, 50, seed=0)]
    (right,), (wrong,) = guide(recording), mislead(recording)
    assert np.corrcoef(right.standard_scores(settings), wrong.standard_scores(settings))[0, 1] < -0.5


def test_policies_are_compared_with_the_first_one_seed_by_seed():
    js_PTSA = np.zeros((2, 1, 4, 5))
    js_PTSA[:, 0, :, 0] = [[0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.5, 0.6]]
    told = Verdict([DEFAULT, WITHOUT], ["faces"], js_PTSA, None, bounded=False).to_json()["policies"]
    more = told[WITHOUT]["minus_first"]["faces"]
    assert np.allclose(more["mean"], [0.2, 0, 0, 0, 0])
    assert np.allclose(more["standard_error"], 0)
    assert told[WITHOUT]["standard_error"][0] > 0.05


def test_trials_that_were_begun_go_on_though_new_ones_promise_more_than_they_hold(recording, monkeypatch):
    """A request is answered by the nearest configuration that is left: never by what the policy has chosen."""

    def share_of_first_stretches():
        answers = Answers(recording)
        policy, sampler = POLICIES[DEFAULT](recording, answers, 0)
        searcher = Searcher(optuna.create_study(), recording.space, policy, sampler=sampler)
        study = Simulation(searcher, answers.respond, 2, recording.take_up_s, answers.limits)
        study.run(recording.budget / 4 / 2)
        reports = [*study.reports.values()]
        return sum(min(2, count) for count in reports) / sum(reports)

    assert share_of_first_stretches() < 0.45
    monkeypatch.setattr(freeze_thaw, "_LEAST_NEW_SHARE", 1.0)
    assert share_of_first_stretches() > 0.55, "the test is of no use"


def test_the_default_finds_more_than_random_search_on_real_faces(recording):
    short = dataclasses.replace(recording, budget=recording.budget / 10)
    found = {
        name: np.mean([simulate(short, name, 2, seed).at(short.budget / 2) for seed in range(6)])
        for name in (DEFAULT, RANDOM)
    }
    assert found[DEFAULT] < found[RANDOM]


@pytest.fixture
def table(tmp_path):
    """Curves of three trials of a small space, as a table to change, and a function that judges it."""
    (tmp_path / "space.yaml").write_text("optim.lr: {uniform: [0.1, 1]}\n")
    frame = pd.DataFrame(
        [(n, epoch, 10.0 * epoch, 0.5 / epoch + n / 10, 0.1 + n / 4) for n in range(3) for epoch in (1, 2, 3)],
        columns=["trial", "epoch", "seconds", "val_js", "optim.lr"],
    ).astype({"val_js": object})

    def judge(*options):
        frame.to_csv(tmp_path / "curves.csv", index=False)
        arguments = [str(tmp_path / "curves.csv"), "--space", str(tmp_path / "space.yaml"), "--seeds", "1"]
        return recorded.main([*arguments, "--workers", "1", "--policies", "random", *options])

    return frame, judge


def test_a_table_is_judged_from_file_to_json(table, tmp_path):
    _, judge = table
    assert judge("--json", str(tmp_path / "verdict.json")) == 0
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert "random" in json.dumps(verdict)


@pytest.mark.parametrize(("row", "column", "value", "sentence"), [
    (1, "val_js", "diverged", "val_js: 'diverged' is not a number"),
    (4, "epoch", 1, "trial 1 has epoch 1 more than once"),
    (2, "seconds", 3.0, "trial 0: seconds do not rise until epoch 3"),
    (5, "seconds", 20.0, "trial 1: seconds do not rise until epoch 3"),
    (3, "optim.lr", None, "trial 1: "),
])  # fmt: skip
def test_a_wrong_value_is_named(table, capsys, row, column, value, sentence):
    frame, judge = table
    frame.loc[row, column] = value
    with pytest.raises(SystemExit) as ended:
        judge()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_configuration_that_was_recorded_twice_is_used_twice(recording):
    twice = dataclasses.replace(
        recording,
        params=[recording.params[0]] * 2,
        value_NR=recording.value_NR[:2],
        seconds_NR=recording.seconds_NR[:2],
    )
    answers = Answers(twice)
    settings = twice.space.suggest(FixedTrial(dict(twice.params[0])))
    assert ([answers.respond(settings)[0] for _ in range(2)] == twice.value_NR).all()
    assert not answers.limits().new


def test_start_points_may_be_parts_of_configurations(table, tmp_path):
    frame, judge = table
    (tmp_path / "space.yaml").write_text(
        "optim.lr: {uniform: [0.1, 1]}\ntrain.batch_size: {choice: [16, 32]}\nstart:\n  - optim.lr: 0.3\n"
    )
    frame["train.batch_size"] = 16
    assert judge("--start-points") == 0
