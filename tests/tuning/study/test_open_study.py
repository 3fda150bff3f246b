import dataclasses

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import Folder, location_of
from raytune_emotion.tuning.policy.warm_start import EARLIER
from raytune_emotion.tuning.study import open_study as module
from raytune_emotion.tuning.study.open_study import load, make_study, open_study, read_study
from raytune_emotion.tuning.study.optuna_study import JOURNAL, study_lock
from raytune_emotion.tuning.study.spec import SPEC, write_spec
from tests.support.studies import spec_of, write_study


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


def test_a_study_is_read_at_a_uri_as_in_its_folder(tmp_path, store):
    folder = tmp_path / "study"
    write_study(folder, store)
    with read_study(Folder(folder)) as here, read_study(location_of(folder.as_uri())) as there:
        assert there.folder != here.folder == folder
        assert there.records() == here.records() != []
        assert there.space.columns() == here.space.columns()
    (folder / JOURNAL).unlink()
    said = f"^{folder.as_uri()}: not a study, because it has no {JOURNAL}"
    with pytest.raises(UserError, match=said), read_study(there.copy.location):
        pass


def test_a_study_can_be_read_whose_space_this_version_cannot_read(tmp_path, store):
    make_study(tmp_path / "study", spec_of(store))
    write_spec(tmp_path / "study", dataclasses.replace(load(tmp_path / "study").spec, space={"optim.lrr": 1.0}))
    with read_study(Folder(tmp_path / "study")) as study:
        assert study.records() == []
    with pytest.raises(UserError, match=r"optim\.lrr"):
        study.space  # noqa: B018
