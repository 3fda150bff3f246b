import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.tuning.policy.warm_start import EARLIER
from raytune_emotion.tuning.study import open_study as module
from raytune_emotion.tuning.study.open_study import load, make_study, open_study
from raytune_emotion.tuning.study.optuna_study import JOURNAL, study_lock
from raytune_emotion.tuning.study.spec import SPEC
from tests.support.studies import spec_of


def test_a_study_is_made_whole_or_not_at_all(tmp_path, store, monkeypatch):
    """What is killed in between does not take the name for good (C13)."""
    folder, spec = tmp_path / "study", spec_of(store)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(module, "write_spec", killed)
        with pytest.raises(KeyboardInterrupt):
            make_study(folder, spec, "[]")
    assert list(tmp_path.iterdir()) == []
    make_study(folder, spec, "[]")
    assert {path.name for path in folder.iterdir()} == {SPEC, JOURNAL, EARLIER}
    assert load(folder).optuna.study_name == "study"
    assert not load(folder).is_over()
    with pytest.raises(UserError, match="exists already"):
        make_study(folder, spec)


def test_a_study_is_one_process_alone(tmp_path, store):
    make_study(tmp_path / "study", spec_of(store))
    with (
        open_study(tmp_path / "study") as study,
        pytest.raises(UserError, match="another process is using it"),
        open_study(tmp_path / "study"),
    ):
        pass
    assert study.spec == load(tmp_path / "study").spec


def test_what_is_no_study_is_not_locked(tmp_path):
    with pytest.raises(UserError, match="not a study"), open_study(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_of_a_dead_search_is_no_obstacle(tmp_path, store):
    make_study(tmp_path / "study", spec_of(store))
    with study_lock(tmp_path / "study"):
        pass
    with open_study(tmp_path / "study"):
        pass
