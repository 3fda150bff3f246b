"""What a search says at its end."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.export_folder import load_package
from raytune_emotion.storage.locations import Folder, Remote
from raytune_emotion.terminal import plain_console
from raytune_emotion.tuning.report.conclusion import advise_confirmation, conclude, gain_over_start
from raytune_emotion.tuning.study.creation import GENERATED
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.records import TrialRecord
from tests.support.reports import make_report
from tests.support.studies import write_study


def trials(*reached, status="complete"):
    return [TrialRecord(f"{i:04d}", status, {}, "", (make_report(1, js),)) for i, js in enumerate(reached)]


def test_it_tells_what_was_gained_over_the_first_trials():
    assert (
        gain_over_start(trials(0.4, 0.35, 0.5, 0.6, 0.3), 0.3, over=True)
        == "0.0500 bits over the best of the first 4 trials (0.3500)"
    )
    assert gain_over_start(trials(0.4, 0.35, 0.5, 0.6, 0.4), 0.35, over=False).startswith("0.0000 bits over")


def test_it_names_the_confirmation_where_others_may_be_as_good():
    study = Folder(Path("ray_results/first"))
    assert advise_confirmation(study, []) == ""
    command = "python -m raytune_emotion.confirm ray_results/first"
    assert advise_confirmation(study, ["0005"]) == (
        f"\n  {command}  # trial 0005 may be as good: train the best with new seeds"
    )
    assert "  # trials 0005, 0015 may be as good" in advise_confirmation(study, ["0005", "0015"])


@pytest.mark.parametrize(("data", "said"), [(GENERATED, 1), ("/data/faces", 0)])
def test_it_says_that_a_model_of_drawn_faces_tells_nothing_of_photos(tmp_path, store, no_plots, capsys, data, said):
    write_study(tmp_path / "study", store, trials=1, epochs=1)
    study = load(tmp_path / "study")
    study = study.with_spec(dataclasses.replace(study.spec, data=data))
    conclude(plain_console(), study, Folder(tmp_path), None)
    assert capsys.readouterr().out.count("note        the faces of the sample are drawn: ") == said


def test_a_study_behind_a_link_goes_on_by_the_name_of_the_link(tmp_path, store, no_plots, capsys):
    write_study(tmp_path / "elsewhere", store, trials=1, epochs=1)
    (tmp_path / "first").symlink_to(tmp_path / "elsewhere")
    conclude(plain_console(), load(tmp_path / "first"), Folder(tmp_path), None)
    assert f" --resume --results {tmp_path} --name first " in capsys.readouterr().out


def test_an_export_at_a_uri_is_whole_or_none(tmp_path, store, no_plots, capsys, monkeypatch):
    write_study(tmp_path / "study", store)
    shutil.copytree(tmp_path / "study", tmp_path / "place" / "study")
    place = Remote((tmp_path / "place" / "study").as_uri())
    study = load(tmp_path / "study", place)
    results = Remote((tmp_path / "place").as_uri())
    conclude(plain_console(), study, results, None)
    assert f"  python -m raytune_emotion.confirm {place}  # trial" in capsys.readouterr().out
    assert load_package(tmp_path / "place" / "study" / "best").image_size == 32

    push = Remote.push

    def broken(self, folder, names):
        names = list(names)
        push(self, folder, names[: len(names) // 2] if "config.json" in names else names)
        if "config.json" in names:
            raise Breakdown("the place is away")

    monkeypatch.setattr(Remote, "push", broken)
    with pytest.raises(Breakdown):
        conclude(plain_console(), study, results, None)
    with pytest.raises(UserError):
        load_package(tmp_path / "place" / "study" / "best")


def test_it_does_not_boast_of_trials_that_nothing_was_learned_for():
    of_failed = trials(0.4, 0.3, 0.3, 0.3, status="failed") + trials(0.4, 0.3, 0.2, 0.1, 0.1)[4:]
    for few, js in ((trials(0.4, 0.35), 0.35), (of_failed, 0.1)):
        assert gain_over_start(few, js, over=False).startswith("not known yet: ")
        assert gain_over_start(few, js, over=True) == "", "it will never be known"


def test_an_unknown_gain_is_left_out_of_the_results_of_a_study_that_is_over(tmp_path, store, no_plots, capsys):
    write_study(tmp_path / "study", store, trials=1, epochs=1)
    study = load(tmp_path / "study")
    conclude(plain_console(), study, Folder(tmp_path), None)
    assert re.search(r"\nbest JS     .*\nbaseline    ", capsys.readouterr().out)
    conclude(plain_console(), study.with_spec(dataclasses.replace(study.spec, trials=9)), Folder(tmp_path), None)
    assert "\ngained      not known yet: " in capsys.readouterr().out
