"""Every private interface of Optuna that this project uses. A new version of Optuna breaks this test."""

import inspect
import json
import time

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileSymlinkLock

from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.optuna_patches import close_when_unused, reopen, stored_trial
from raytune_emotion.tuning.study.optuna_study import JOURNAL, create_study
from tests.support.studies import SEARCH_SPACE


def test_a_trial_can_be_reopened_by_its_number():
    assert tuple(inspect.signature(optuna.Trial).parameters) == ("study", "trial_id")
    study = optuna.create_study()
    asked = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    again = reopen(study, study.trials[0])
    again.report(0.5, 1)
    assert stored_trial(asked).intermediate_values == {1: 0.5}


def test_connections_of_a_storage_are_closed_with_it(tmp_path):
    closed = []
    storage = close_when_unused(RDBStorage(f"sqlite:///{tmp_path}/studies.db"))
    optuna.create_study(storage=storage).ask()
    sqlalchemy.event.listen(storage.engine, "close", lambda *_: closed.append("connection"))
    del storage
    assert {*closed} == {"connection"}


@pytest.fixture
def set_time_zone():
    """Sets the time zone of this process."""
    with pytest.MonkeyPatch.context() as patched:

        def set_zone(zone):
            patched.setenv("TZ", zone)
            time.tzset()

        yield set_zone
    time.tzset()


def test_times_in_a_database_are_right_in_another_time_zone(tmp_path, set_time_zone):
    """Optuna keeps them in UTC, and gives local time; drivers of a study, and who reads it, may live anywhere."""
    url = f"sqlite:///{tmp_path}/studies.db"
    set_time_zone("EST5")
    study = optuna.create_study(storage=url, study_name="s")
    study.tell(study.ask(), 0.5)
    set_time_zone("JST-9")
    (trial,) = optuna.load_study(study_name="s", storage=url).trials
    for moment in (trial.datetime_start, trial.datetime_complete):
        assert moment.timestamp() == pytest.approx(time.time(), abs=60)


def test_the_lock_of_a_journal_can_be_released():
    assert callable(JournalFileSymlinkLock.release)


def test_a_journal_is_a_line_a_change(tmp_path):
    """A torn last line is cut off; that is safe where each line stands for itself."""
    create_study(tmp_path, parse_space(SEARCH_SPACE)).ask()
    raw = (tmp_path / JOURNAL).read_bytes()
    assert raw.endswith(b"\n")
    assert all(isinstance(json.loads(line), dict) for line in raw.splitlines())
