"""The record of a study at another place: what is pushed, how much, and what a reader finds there."""

import json
import random
import shutil

import pytest

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Remote
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.study import remote_copy, tables
from raytune_emotion.tuning.study.open_study import load, make_study, read_study
from raytune_emotion.tuning.study.remote_copy import DRIVER, PIECES, TAKEN_OVER, RemoteCopy, join_pieces
from raytune_emotion.tuning.study.spec import SPEC
from raytune_emotion.tuning.study.tables import TRIALS
from raytune_emotion.tuning.study.trials import trial_folder
from tests.support.reports import make_report
from tests.support.studies import spec_of
from tests.support.studies_at_uri import fetch

FILE = "journal.txt"


@pytest.fixture
def place(tmp_path):
    return Remote((tmp_path / "place").as_uri())


@pytest.fixture
def driver(tmp_path, place, monkeypatch):
    """Makes the next driver of a journal, with what it finds at the place."""
    monkeypatch.setattr(remote_copy, "_PIECE", 100)

    def begin(name):
        folder = tmp_path / name
        folder.mkdir()
        if place.exists():
            find(place, folder)
        else:
            (folder / FILE).write_bytes(b"0\n")
        copy = RemoteCopy(folder, place)
        copy.claim(journal=FILE)
        return copy

    return begin


def find(place, folder):
    place.pull(folder, place.find(FILE, *PIECES))
    join_pieces(folder, FILE)
    return (folder / FILE).read_bytes()


def grow(copy, lines):
    with (copy.folder / FILE).open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    copy.push_journal()
    return (copy.folder / FILE).read_bytes()


def test_of_two_drivers_with_one_number_the_one_that_recorded_more_counts_once_both_have_ended(place, tmp_path):
    pieces = {"000001-aaaaaaaaaaaa": "", "000001-bbbbbbbbbbbb": "1\n2\n", "000001-cccccccccccc": ""}
    files = {f"journal/{name}/000000000002": piece for name, piece in pieces.items()}
    for name, text in (files | {FILE: "0\n", DRIVER: "000002-dddddddddddd"}).items():
        with place.write(name) as path:
            path.write_text(text)
    assert find(place, tmp_path / "reader") == b"0\n1\n2\n"


def test_journal_is_whole_after_every_push_and_driver(driver, place, tmp_path):
    lines = random.Random(0)
    for number in range(3):
        copy = driver(f"driver {number}")
        for _ in range(8):
            journal = grow(copy, (lines.random() for _ in range(lines.randrange(4))))
            shutil.rmtree(tmp_path / "reader", ignore_errors=True)
            assert find(place, tmp_path / "reader") == journal
    assert place.read(FILE) != journal, "it was pushed when the last driver began"
    copy.push(FILE)
    assert place.read(FILE) == find(place, tmp_path / "reader") == journal
    pieces = place.find(PIECES[1])
    assert len({piece.split("/")[1] for piece in pieces}) == 2, "pieces of earlier drivers are deleted"
    assert max(place.sizes(pieces)) < 300


def test_push_of_a_driver_that_was_taken_for_dead_changes_nothing(driver, place, tmp_path, monkeypatch):
    stale = driver("stale")
    grow(stale, ["a" * 60, "b" * 60])
    monkeypatch.setattr(stale, "check_driver", lambda: None)  # it had looked just before the other one began
    copy = driver("after")
    assert find(place, tmp_path / "reader") == (copy.folder / FILE).read_bytes()
    grow(stale, ["late" * 30])
    journal = grow(copy, ["c"])
    grow(stale, ["later" * 30])
    assert find(place, tmp_path / "reader") == journal
    assert grow(driver("third"), ["d"]) == journal + b"d\n"


def test_strange_names_of_pieces_are_passed_over_and_a_missing_piece_is_an_error(driver, place, tmp_path):
    copy = driver("first")
    journal = grow(copy, ["a"])
    (folder,) = place.list_folders("journal")
    for name in ("journal/strange/000000000000", f"journal/{folder}/.nfs0001", f"journal/{folder}/last"):
        with place.write(name) as path:
            path.write_bytes(b"strange")
    assert find(place, tmp_path / "reader") == journal
    with place.write(f"journal/{folder}/000000009999") as path:
        path.write_bytes(b"late")
    with pytest.raises(UserError, match="a piece before 000000009999 is missing"):
        find(place, tmp_path / "another reader")


def test_journal_that_was_continued_in_its_folder_is_longer_than_its_pieces(driver, place, tmp_path):
    copy = driver("first")
    journal = grow(copy, ["a"])
    copy.push(FILE)
    continued = journal + b"b\n"
    with place.write(FILE) as path:
        path.write_bytes(continued)
    assert find(place, tmp_path / "reader") == continued
    assert grow(driver("second"), ["c"]) == continued + b"c\n"
    assert find(place, tmp_path / "another reader") == continued + b"c\n"


# With a recorder


@pytest.fixture
def begin(tmp_path, store, place):
    """Makes a study of this number of trials; returns it with what was pushed, in bytes."""

    def make(trials=1):
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        folder = tmp_path / f"study of {trials}"
        space = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "loss": "kl"}
        make_study(folder, spec_of(store, space=space, trials=trials, epochs=1, sampler="random", scheduler="none"))
        return load(folder, place)

    return make


def train(study, trial_id):
    """Write at the study's location what a trial's process does; return its report."""
    report = make_report(1, 0.3, finished=True, time=1.0, images_per_second=1.0)
    trial = trial_folder(study.folder.parent / study.copy.location.name, trial_id)
    trial.mkdir(parents=True)
    for name, content in ((LAST, "last"), (BEST, "best"), (HISTORY, json.dumps(report) + "\n")):
        (trial / name).write_text(content)
    return report


def test_pushed_bytes_are_proportional_to_the_number_of_trials(begin, monkeypatch):
    monkeypatch.setattr(remote_copy, "_PIECE", 2**11)
    monkeypatch.setattr(tables, "_REST", 0)  # the tables are written after every ending
    monkeypatch.setattr(tables, "_GROWTH", 1.3)
    pushed = []
    push = remote.push

    def count(folder, uri, names):
        pushed.extend((folder / name).stat().st_size for name in names)
        push(folder, uri, names)

    def run(trials):
        pushed.clear()
        study = begin(trials)
        recorder = Recorder(study)
        while (proposal := recorder.next()) is not None:
            recorder.report(proposal.trial_id, train(study, proposal.trial_id))
            recorder.write_in_time()
        recorder.close()
        assert len((study.folder / TRIALS).read_text().splitlines()) == trials + 1
        return sum(pushed)

    monkeypatch.setattr(remote, "push", count)
    few = run(16)
    assert run(32) < 2 * few


def test_ending_that_a_killed_driver_did_not_push_is_read_from_the_trial(begin, place):
    now = [0.0]
    study = begin()
    recorder = Recorder(study, clock=lambda: now[0])
    proposal = recorder.next()
    assert not recorder.report(proposal.trial_id, train(study, proposal.trial_id))
    recorder.write_in_time()

    def status_there():
        with read_study(place) as there:
            return [record.status for record in there.records()]

    assert status_there() == ["running"], "an ending waits for the next beginning, for some seconds"
    shutil.rmtree(study.folder)
    fetch(study.folder, place.uri)
    recorder = Recorder(load(study.folder, place), clock=lambda: now[0])
    assert recorder.next() is None, "it is not trained again"
    now[0] += 5
    recorder.write_in_time()
    assert status_there() == ["complete"]
    assert place.read(SPEC) == (study.folder / SPEC).read_bytes()


def test_claim_from_an_old_copy_is_refused_and_a_driver_that_was_replaced_notices_it_without_an_ending(begin, place):
    now = [0.0]
    study = begin()
    first = Recorder(study, clock=lambda: now[0])
    elsewhere = study.folder.with_name("elsewhere")
    fetch(elsewhere, place.uri)
    late = load(elsewhere, place)
    again = study.folder.with_name("again")
    fetch(again, place.uri)
    second = Recorder(load(again, place))
    assert second.next() is not None
    refused = Recorder(late)
    assert refused.is_over
    with pytest.raises(Breakdown, match="another process has made or continued this study meanwhile; type the same"):
        refused.close()
    first.write_in_time()
    assert not first.broken
    now[0] += 30
    first.write_in_time()
    with pytest.raises(Breakdown, match=f"{place}: {TAKEN_OVER}$"):
        first.close()
    assert place.read(DRIVER) == (again / DRIVER).read_bytes()


def test_what_a_driver_records_while_another_one_begins_is_not_lost(begin, place):
    """A job that is taken for lost, and runs on while another machine reads the study, joins its cluster, and so on."""
    study = begin(trials=3)
    first = Recorder(study)
    elsewhere = study.folder.with_name("elsewhere")
    fetch(elsewhere, place.uri)
    late = load(elsewhere, place)
    assert first.report(first.next().trial_id, train(study, "0000")) is False
    began = first.next().trial_id
    second = Recorder(late)
    assert second.is_over
    with pytest.raises(Breakdown, match="another process has made or continued this study meanwhile; type the same"):
        second.close()
    with pytest.raises(Breakdown, match=f"{place}: {TAKEN_OVER}$"):
        first.close()
    # The same command reads what the first one has recorded, and goes on with its trial.
    again = study.folder.with_name("again")
    fetch(again, place.uri)
    third = Recorder(load(again, place))
    assert [record.status for record in load(again, place).records()] == ["complete", "running"]
    assert third.next().trial_id == began


def test_new_study_does_not_replace_one_that_another_process_has_made_meanwhile(begin, place):
    made = begin(1)
    Recorder(made).close()
    spec = place.read(SPEC)
    folder = made.folder.with_name("another")
    make_study(folder, made.spec)
    with pytest.raises(Breakdown, match="another process has made or continued this study meanwhile"):
        Recorder(load(folder, place)).close()
    assert place.read(SPEC) == spec
