"""Optuna's dashboard shows a study while it runs."""

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from werkzeug.test import Client

from raytune_emotion.storage.atomic import exclusive_lock
from raytune_emotion.tuning.policy.trial_attributes import PAUSED
from raytune_emotion.tuning.study.open_study import load
from tests.support.studies import write_study


@pytest.fixture
def ask(tmp_path, store):
    """Ask the dashboard of a study in which a trial runs, one is paused and one has failed."""
    folder = tmp_path / "study"
    write_study(folder, store)
    study = load(folder).optuna
    study.ask({"optim.warmup_epochs": FloatDistribution(0.0, 1.0)})  # a setting that the others lack
    study.ask().set_user_attr(PAUSED, True)
    study.add_trial(create_trial(state=TrialState.FAIL))
    app = pytest.importorskip("optuna_dashboard", reason="the extra dashboard is not installed").wsgi
    with exclusive_lock(folder):  # as the process that works on it
        client = Client(app(str(folder / "optuna.journal")))  # what the command serves
        yield lambda path: client.get(path).json


def test_the_dashboard_opens_the_journal_of_a_running_study(ask):
    (study,) = ask("/api/studies")["study_summaries"]
    shown = ask(f"/api/studies/{study['study_id']}")
    states = [trial["state"] for trial in shown["trials"]]
    assert states == ["Complete"] * 3 + ["Running", "Running", "Fail"]
    assert [param["name"] for param in shown["trials"][3]["params"]] == ["optim.warmup_epochs"]
    assert [attr["key"] for attr in shown["trials"][4]["user_attrs"]] == [PAUSED]
    assert shown["objective_names"] == ["best validation JS, bits"]
    weights = {attr["key"] for attr in shown["trials"][0]["user_attrs"]} & {"loss.kl", "loss.js"}
    assert weights == {"loss.kl", "loss.js"}  # the parameters of a mixture are others
    assert {item["name"] for item in shown["union_search_space"]} >= {"optim.warmup_epochs"}
