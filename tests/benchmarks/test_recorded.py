import dataclasses

import numpy as np
import optuna
import pandas as pd
import pytest

from benchmarks.curves.recorded import read_recording
from benchmarks.curves.replay import CURVES, read_space
from benchmarks.judge import DEFAULT, POLICIES, RANDOM, Answers, simulate
from benchmarks.simulation import Simulation
from raytune_emotion.tuning.policy import freeze_thaw
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
    monkeypatch.setattr(freeze_thaw, "_NEW_SHARE", 1.0)
    assert share_of_first_stretches() > 0.55, "the test is of no use"


def test_the_default_finds_more_than_random_search_on_real_faces(recording):
    short = dataclasses.replace(recording, budget=recording.budget / 10)
    found = {
        name: np.mean([simulate(short, name, 2, seed).at(short.budget / 2) for seed in range(3)])
        for name in (DEFAULT, RANDOM)
    }
    assert found[DEFAULT] < found[RANDOM]
