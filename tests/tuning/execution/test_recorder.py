"""The record of a running study, driven by hand: no Ray, and but for one test no training."""

import contextlib
import dataclasses
import errno
import json
import shutil
import threading
from types import SimpleNamespace

import pandas as pd
import pytest
from optuna.trial import TrialState

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST, PREDICTIONS
from raytune_emotion.storage.locations import Folder, Remote
from raytune_emotion.tuning.execution import backlog as backlog_module
from raytune_emotion.tuning.execution import recorder as recorder_module
from raytune_emotion.tuning.execution.job import job_of, train_here
from raytune_emotion.tuning.execution.recorder import MAX_FAILURES_IN_A_ROW, Recorder
from raytune_emotion.tuning.policy.decisions import NO_LIMITS, Begin, Prune, TakeUp
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.policies import make_policy
from raytune_emotion.tuning.policy.trial_attributes import PAUSED, SETTINGS, TAKEN_UP
from raytune_emotion.tuning.study.endings import Broken, Failed
from raytune_emotion.tuning.study.open_study import go_on, load, make_study, open_study, raise_epochs, read_study
from raytune_emotion.tuning.study.optuna_study import JOURNAL, Proposal, Searcher, trials_to_continue
from raytune_emotion.tuning.study.records import KEPT
from raytune_emotion.tuning.study.remote_copy import TAKEN_OVER
from raytune_emotion.tuning.study.tables import CURVES, TRIALS
from raytune_emotion.tuning.study.trials import trial_folder
from tests.support.reports import make_report, without_clocks
from tests.support.scripted_policy import ScriptedPolicy
from tests.support.studies import ONE_CORE, run_here, spec_of, train

SPACE = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "loss": "kl"}


@pytest.fixture
def folder(tmp_path, store):
    make_study(tmp_path / "study", spec_of(store, space=SPACE, trials=4, epochs=3))
    return tmp_path / "study"


def run(recorder, folder, values, **options):
    """Run every trial that a recorder gives, one after the other, each with a JS of its own."""
    begun = []
    while (proposal := recorder.next()) is not None:
        begun.append(proposal.trial_id)
        for report in train(folder, proposal.trial_id, values[proposal.trial_id], time=len(begun), **options):
            if not recorder.report(proposal.trial_id, report):
                break
    return begun


def statuses(folder):
    return {record.trial_id: record.status for record in load(folder).records()}


VALUES = {f"{i:04d}": js for i, js in enumerate((0.30, 0.20, 0.40, 0.10, 0.35, 0.25))}


def test_a_study_runs_to_its_end_and_its_tables(folder):
    events = []
    recorder = Recorder(load(folder), events.append)
    assert run(recorder, folder, VALUES) == ["0000", "0001", "0002", "0003"]
    assert recorder.is_over
    recorder.close()
    # The rung is at the first of three epochs: 0002 is worse than a third of those before it.
    assert statuses(folder) == {"0000": "complete", "0001": "complete", "0002": "pruned", "0003": "complete"}
    assert (folder / TRIALS).read_text().splitlines()[1].startswith("0003,complete,3.0,0.1")
    assert (folder / CURVES).exists()
    ended = [(event.proposal.trial_id, event.status) for event in events if event.status != "running"]
    assert ended == [("0000", "complete"), ("0001", "complete"), ("0002", "pruned"), ("0003", "complete")]
    told = load(folder).optuna.trials
    assert [trial.value for trial in told] == [0.3, 0.2, 0.4, 0.1]
    assert told[2].intermediate_values == {1: 0.4}


def test_weights_of_all_but_the_best_are_deleted(folder):
    recorder = Recorder(load(folder))
    run(recorder, folder, VALUES)
    kept = {file.parent.name for file in folder.glob(f"trials/*/{BEST}")}
    assert kept == {"0000", "0001", "0003"}
    assert len(kept) == KEPT


def test_weights_of_an_earlier_session_are_deleted_when_one_more_trial_betters_them(folder):
    recorder = Recorder(load(folder))
    run(recorder, folder, VALUES)
    recorder.close()
    study = load(folder)
    recorder = Recorder(study.with_spec(dataclasses.replace(study.spec, trials=5)))
    assert run(recorder, folder, VALUES | {"0004": 0.05}) == ["0004"]
    assert {file.parent.name for file in folder.glob(f"trials/*/{BEST}")} == {"0001", "0003", "0004"}


@pytest.mark.parametrize("visible", [[], [make_report(1, 0.5)]])
def test_a_trial_whose_reports_become_visible_late_keeps_its_weights_and_its_rank(folder, visible):
    """A client of NFS shows a file of another machine up to a minute late."""
    recorder = Recorder(load(folder))
    history = trial_folder(folder, "0003") / HISTORY
    written = []
    while (proposal := recorder.next()) is not None:
        for report in train(folder, proposal.trial_id, VALUES[proposal.trial_id]):
            if proposal.trial_id == "0003" and report["finished"]:
                written.append(history.read_text())
                history.write_text("".join(json.dumps(each) + "\n" for each in visible))
            if not recorder.report(proposal.trial_id, report):
                break
    assert {*trial_folder(folder, "0003").iterdir()} >= {history.with_name(BEST), history.with_name(LAST)}
    recorder._tables.write()
    assert (folder / TRIALS).read_text().splitlines()[-1].startswith("0003,complete")
    history.write_text(*written)
    recorder._tables.write()
    recorder.close()
    assert (folder / TRIALS).read_text().splitlines()[1].startswith("0003,complete,3.0,0.1")
    assert pd.read_parquet(folder / CURVES)["trial_id"].value_counts()["0003"] == 3


def test_a_trial_that_broke_off_goes_on_and_one_that_was_stopped_is_told_so(folder):
    first = Recorder(load(folder))
    proposals = [first.next() for _ in range(4)]
    runs = [train(folder, proposal.trial_id, VALUES[proposal.trial_id], time=1) for proposal in proposals]
    goes_on = [first.report(p.trial_id, next(r)) for p, r in zip(proposals, runs, strict=True)]
    assert goes_on == [True, True, False, True]
    # As if the process was killed between the decision and its record: 0001 has reported more, and nobody heard it.
    next(runs[1])
    second = Recorder(load(folder))
    assert statuses(folder)["0002"] == "pruned"
    assert [second.next().trial_id for _ in range(3)] == ["0000", "0001", "0003"]
    assert second.next() is None
    assert not second.is_over, "three trials run"
    assert [*load(folder).optuna.trials[1].intermediate_values] == [1, 2]


def test_a_trial_that_was_let_go_on_after_a_replay_is_not_stopped_by_an_older_report(folder):
    """Another driver has let it go on, and dies later; this one's scheduler would have stopped it."""
    inputs = PolicyInputs(load(folder).space, 3, 3, 0)
    policy = make_policy(inputs, scheduler="asha")
    reports = [make_report(i, 0.5, time=10.0 + i) for i in (1, 2)]
    best = SimpleNamespace(trial_id="0000", status="running", reports=[make_report(1, 0.1, time=1.0)])
    policy.replay([best, SimpleNamespace(trial_id="0001", status="running", reports=reports[:1])])
    assert policy.decide_again("0001", reports[0], [], NO_LIMITS) == "stop"
    assert policy.decide_again("0001", reports[1], [], NO_LIMITS) == "go on"


def test_a_report_that_is_heard_twice_decides_nothing(folder):
    recorder = Recorder(load(folder))
    for _ in range(2):
        proposal = recorder.next()
        reports = train(folder, proposal.trial_id, 0.1, time=1)
        assert recorder.report(proposal.trial_id, next(reports))
    worse = recorder.next().trial_id
    late = next(train(folder, worse, 0.9, time=2))
    recorder._searcher.observe(worse, late)  # heard before its process died
    assert recorder.report(worse, late), "it would be stopped now"


def test_a_failed_trial_keeps_its_reason_and_the_study_goes_on(folder):
    recorder = Recorder(load(folder))
    failed = recorder.next().trial_id
    recorder.end(failed, Failed("the loss is not a number"))
    assert run(recorder, folder, VALUES) == ["0001", "0002", "0003"]
    recorder.close()
    record = load(folder).record(failed)
    assert (record.status, record.reason) == ("failed", "the loss is not a number")
    assert load(folder).optuna.trials[0].state == TrialState.FAIL


def test_ten_failures_in_a_row_end_the_study_with_their_reason(tmp_path, store):
    folder = tmp_path / "study"
    make_study(folder, spec_of(store, space=SPACE, trials=30, epochs=1))
    recorder = Recorder(load(folder))
    ended = 0
    while (proposal := recorder.next()) is not None:
        if ended == 3:  # they are counted from the last success on
            recorder.report(proposal.trial_id, next(train(folder, proposal.trial_id, 0.3, epochs=1)))
        else:
            recorder.end(proposal.trial_id, Failed(f"diverged at {ended}"))
        ended += 1
    assert ended == 4 + MAX_FAILURES_IN_A_ROW
    with pytest.raises(Breakdown) as raised:
        recorder.close()
    assert str(raised.value) == (
        f"10 trials have failed one after the other, the last one: diverged at 13; the study can be resumed: {folder}"
    )
    assert len((folder / TRIALS).read_text().splitlines()) == 15, "the tables hold all of it"


def test_what_breaks_a_trial_off_ends_the_study_and_not_the_trial(folder):
    recorder = Recorder(load(folder))
    trial_id = recorder.next().trial_id
    recorder.end(trial_id, Broken("s3://bucket: no answer"))
    assert recorder.next() is None
    with pytest.raises(Breakdown, match="s3://bucket: no answer; the study can be resumed: "):
        recorder.close()
    assert statuses(folder) == {trial_id: "running"}


class TestARecordThatCannotBeWritten:
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (OSError(errno.EIO, "Input/output error"), "the record cannot be read or written: [Errno 5] Input/output"),
            (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
            (UserError("history.jsonl: line 3 is damaged"), "history.jsonl: line 3 is damaged"),
            (Breakdown("the URI is away"), "the URI is away"),
        ],
    )
    def test_an_error_at_an_ending_is_the_reason_of_the_end(self, folder, monkeypatch, error, told):
        """Ray Tune would take it for a failure of the trial, and the cause would be lost (C2)."""
        recorder = Recorder(load(folder))
        trial_id = recorder.next().trial_id

        def tell(*_, **__):
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(Searcher, "tell", tell)
            for report in train(folder, trial_id, 0.3):
                goes_on = recorder.report(trial_id, report)
        assert not goes_on
        before = (folder / JOURNAL).read_bytes()
        assert recorder.next() is None
        assert not recorder.report(trial_id, report)
        recorder.end(trial_id, Failed("late"))
        recorder.write_in_time()
        with pytest.raises(Breakdown) as raised:
            recorder.close()
        assert told in str(raised.value)
        assert (folder / JOURNAL).read_bytes() == before, "nothing may be written behind a torn line"

        # What the error kept from the record is in the trial's folder, and the study goes on.
        again = Recorder(load(folder))
        assert statuses(folder)[trial_id] == "complete"
        assert run(again, folder, VALUES) == ["0001", "0002", "0003"]

    def test_asking_ends_the_study_at_once(self, folder, monkeypatch):
        """Ray Tune would ask again every second for ten minutes, and each time begin a trial that never runs (C1)."""
        recorder = Recorder(load(folder))

        def away(*_):
            raise Breakdown("the URI is away")

        monkeypatch.setattr(type(load(folder).copy), "push_journal", away)
        for _ in range(20):
            assert recorder.next() is None
            assert recorder.is_over
        assert len(load(folder).optuna.trials) == 1
        with pytest.raises(Breakdown, match="the URI is away; the study can be resumed"):
            recorder.close()

    def test_a_fault_of_this_project_keeps_its_traceback(self, folder, monkeypatch):
        recorder = Recorder(load(folder))
        monkeypatch.setattr(Searcher, "ask", lambda *_, **__: 1 / 0)
        assert recorder.next() is None
        with pytest.raises(ZeroDivisionError):
            recorder.close()

    def test_tables_that_cannot_be_written_end_the_study(self, folder, monkeypatch):
        recorder = Recorder(load(folder))
        (folder / TRIALS).mkdir()
        recorder.report(recorder.next().trial_id, make_report(1, 0.3, finished=True, time=1.0))
        recorder.write_in_time()
        assert recorder.is_over
        with pytest.raises(Breakdown, match="Is a directory"):
            recorder.close()


@pytest.mark.usefixtures("without_locks")
def test_search_that_another_one_has_continued_writes_nothing_where_the_file_system_has_no_locks(folder):
    """Slurm may requeue a job whose node is only away, on Lustre that is mounted without flock."""
    with open_study(folder) as before:
        stale = Recorder(before)
        with open_study(folder) as after, open_study(folder) as late:
            assert not stale.is_over
            recorder = Recorder(after)
        assert stale.next() is None
        assert stale.is_over
        assert Recorder(late).broken == f"{folder}: {TAKEN_OVER}", "it has read a study that has changed since"
        trial_id = recorder.next().trial_id
        journal = (folder / JOURNAL).read_bytes()
        assert not stale.report(trial_id, make_report(1, 0.3, time=1.0))
        with pytest.raises(Breakdown, match=f"^{folder}: {TAKEN_OVER}$"):
            stale.close()
        assert (folder / JOURNAL).read_bytes() == journal
        assert run(recorder, folder, VALUES) == ["0001", "0002", "0003"]


def test_nothing_is_recorded_once_it_is_closed(folder):
    """A thread of Ray Tune's that could not be ended may still call."""
    recorder = Recorder(load(folder))
    trial_id = recorder.next().trial_id
    recorder.close()
    before = (folder / JOURNAL).read_bytes()
    late = threading.Thread(target=lambda: recorder.report(trial_id, make_report(1, 0.1, time=1.0)))
    late.start()
    late.join()
    assert recorder.next() is None
    assert (folder / JOURNAL).read_bytes() == before


class TestPauses:
    @pytest.fixture
    def policy(self, monkeypatch):
        policy = ScriptedPolicy()
        monkeypatch.setattr(recorder_module, "make_policy", lambda *_, **__: policy)
        return policy

    def test_a_paused_trial_is_taken_up_where_it_was_also_in_another_session(self, folder, policy):
        policy.decisions = {("0000", 1): "pause"}
        policy.answers = [Begin({}), Begin({}), TakeUp(0)]
        recorder = Recorder(load(folder))
        assert recorder.next().trial_id == "0000"
        first = train(folder, "0000", 0.3)
        assert not recorder.report("0000", next(first)), "it leaves its process"
        assert statuses(folder) == {"0000": "paused"}
        assert recorder.next().trial_id == "0001"
        assert policy.pasts[-1][0][PAUSED]
        assert SETTINGS in policy.pasts[-1][0]
        recorder.close()
        assert "0000,paused,1.0,0.3" in (folder / TRIALS).read_text()

        recorder = Recorder(load(folder))
        assert recorder.next().trial_id == "0001", "it ran"
        taken_up = recorder.next()
        assert taken_up.trial_id == "0000"
        assert statuses(folder) == {"0000": "running", "0001": "running"}
        assert [recorder.report("0000", report) for report in train(folder, "0000", 0.3)] == [True, False]
        assert statuses(folder)["0000"] == "complete"

    @pytest.mark.parametrize("heard", [True, False])
    def test_a_pause_that_was_not_recorded_is_made_up_for(self, folder, policy, heard):
        """The process was killed between a report, or its decision, and the pause."""
        policy.answers = [Begin({}), TakeUp(0)]
        recorder = Recorder(load(folder))
        reports = train(folder, recorder.next().trial_id, 0.3)
        first = next(reports)
        if heard:
            assert recorder.report("0000", first)
        policy.decisions = {("0000", 1): "pause"}
        recorder = Recorder(load(folder))
        assert statuses(folder) == {"0000": "paused"}
        assert recorder.next().trial_id == "0000"

    def test_a_trial_that_was_paused_is_what_it_would_have_been_without_pauses(self, tmp_path, store, policy):
        space = {**SPACE, "model.backbone": "test_resnet"}
        make_study(tmp_path / "study", spec_of(store, space=space, trials=2, epochs=3))
        policy.decisions = {("0000", 2): "pause", ("0001", 1): "stop"}
        policy.answers = [Begin({}), Begin({}), TakeUp(0), None]
        record = run_here(load(tmp_path / "study"))[0]
        assert len(record.reports) == 3
        assert load(tmp_path / "study").optuna.trials[0].user_attrs[TAKEN_UP] == 1
        job = job_of(load(tmp_path / "study"), ONE_CORE, Proposal("0000", record.settings, None))
        alone = dataclasses.replace(job, folder=str(tmp_path / "alone"), location=None)
        with contextlib.closing(train_here(alone)) as reports:
            assert without_clocks(record.reports) == without_clocks(reports)

    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_the_checkpoints_of_paused_trials_are_bounded_where_the_study_lies(
        self, folder, policy, tmp_path, monkeypatch, elsewhere
    ):
        place = tmp_path / "there" if elsewhere else folder
        monkeypatch.setattr(backlog_module, "PAUSED_BYTES", 5 * len(b"weights"))
        policy.decisions, policy.answers = {("0000", 1): "pause"}, [Begin({}), Begin({}), None]
        recorder = Recorder(load(folder, Folder(place)))
        assert recorder.next().trial_id == "0000"
        report = next(train(folder, "0000", 0.3))
        if elsewhere:
            shutil.copytree(folder / "trials" / "0000", place / "trials" / "0000")
        assert not recorder.report("0000", report)
        assert recorder.next().trial_id == "0001"
        assert policy.limits[0].paused == backlog_module.PAUSED_TRIALS
        assert policy.limits[1].paused == 2, "each has its newest and its best weights"
        assert Recorder(load(folder, Folder(place)))._backlog.limits.paused == 2

    def test_a_trial_that_is_paused_at_the_end_is_pruned(self, folder, policy):
        policy.decisions = {(f"{i:04d}", 1): "pause" for i in range(3)}
        policy.answers = [Begin({}), Begin({}), Begin({}), Prune(1), None]
        events = []
        recorder = Recorder(load(folder), events.append)
        for i in range(3):
            recorder.report(recorder.next().trial_id, next(train(folder, f"{i:04d}", 0.3 + i)))
        assert recorder.next() is None
        assert statuses(folder) == {"0000": "paused", "0001": "pruned", "0002": "paused"}
        assert recorder.is_over
        recorder.close()
        assert set(statuses(folder).values()) == {"pruned"}
        assert [event.status for event in events][-3:] == ["pruned"] * 3
        assert [trial.state for trial in load(folder).optuna.trials] == [TrialState.PRUNED] * 3

    def test_a_policy_that_has_nothing_for_now_is_asked_again_when_something_has_happened(self, folder, policy):
        policy.answers = [Begin({}), None, Begin({})]
        recorder = Recorder(load(folder))
        trial_id = recorder.next().trial_id
        for _ in range(5):
            assert recorder.next() is None
        assert not recorder.is_over
        assert len(policy.answers) == 1, "it is asked once"
        recorder.report(trial_id, next(train(folder, trial_id, 0.3)))
        assert recorder.next().trial_id == "0001"


def test_to_raise_the_epochs_twice_enqueues_the_best_once(folder):
    """A process that was killed between the two has enqueued them, and not written the spec (C10)."""
    recorder = Recorder(load(folder))
    run(recorder, folder, VALUES)
    recorder.close()
    study = load(folder)
    longer = dataclasses.replace(study.spec, epochs=5)
    once = raise_epochs(study, longer)
    again = raise_epochs(study, longer)  # with the spec of before
    assert once.spec == again.spec
    assert once.spec.trials == 4 + 3
    waiting = [t.user_attrs["continues"] for t in study.optuna.trials if t.state == TrialState.WAITING]
    assert waiting == ["0003", "0001", "0000"]
    (trial_folder(folder, "0003") / PREDICTIONS).write_bytes(b"predictions")

    recorder = Recorder(load(folder))
    proposal = recorder.next()
    assert (proposal.trial_id, proposal.continues) == ("0004", "0003")
    assert (trial_folder(folder, "0004") / LAST).exists()
    assert (trial_folder(folder, "0004") / PREDICTIONS).read_bytes() == b"predictions"
    goes_on = train(folder, "0004", 0.1, epochs=5)
    assert recorder.report("0004", next(goes_on))

    # Interrupted, it goes on from where it was itself, and not from 0003 once more.
    recorder = Recorder(load(folder))
    assert recorder.next().trial_id == "0004"
    assert not recorder.report("0004", next(goes_on))
    record = load(folder).record("0004")
    assert record.settings == load(folder).record("0003").settings
    assert record.reports[:3] == load(folder).record("0003").reports
    assert [report["report"] for report in record.reports] == [1, 2, 3, 4, 5]
    assert [*load(folder).optuna.trials[4].intermediate_values] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory, store):
    """A study whose one trial has reported twice: its folder, and the reports."""
    folder = tmp_path_factory.mktemp("broken off") / "study"
    make_study(folder, spec_of(store, space={**SPACE, "model.backbone": "test_resnet"}, trials=1, epochs=3))
    study = load(folder)
    recorder = Recorder(study)
    proposal = recorder.next()
    with contextlib.closing(train_here(job_of(study, ONE_CORE, proposal))) as reports:
        before = [next(reports), next(reports)]
    assert all(recorder.report(proposal.trial_id, report) for report in before)
    return folder, before


@pytest.mark.parametrize("damage", ["gone", "cut", "garbage"])
def test_trial_whose_checkpoint_is_gone_or_damaged_starts_anew_and_says_so(broken_off, tmp_path, damage):
    whole_study, before = broken_off
    folder, events = tmp_path / "study", []
    shutil.copytree(whole_study, folder)
    last = trial_folder(folder, "0000") / LAST
    whole = last.read_bytes()
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(whole[:-7] if damage == "cut" else whole[:20] + b"\xff" + whole[21:])

    (record,) = run_here(load(folder), watch=events.append)
    assert record.status == "complete"
    assert without_clocks(record.reports[:2]) == without_clocks(before)
    assert len(record.reports) == 3
    assert [event.reason for event in events] == [
        "",
        "starts anew, as its checkpoint is gone or damaged",
        "",
        "",
    ]


def test_trial_that_was_to_go_on_from_weights_that_are_gone_starts_anew_and_says_so(folder):
    recorder = Recorder(load(folder))
    run(recorder, folder, VALUES)
    recorder.close()
    study = load(folder)
    raise_epochs(study, dataclasses.replace(study.spec, epochs=5))
    (trial_folder(folder, "0003") / BEST).unlink()
    events = []
    recorder = Recorder(load(folder), events.append)
    proposal = recorder.next()
    assert (proposal.trial_id, proposal.continues) == ("0004", "0003")
    assert [event.reason for event in events] == [
        "starts anew, as the checkpoint of trial 0003, which it was to go on from, is gone"
    ]
    reports = train(folder, "0004", 0.05, epochs=5)
    assert [recorder.report("0004", report) for report in reports] == [True] * 4 + [False]
    assert statuses(folder)["0004"] == "complete"
    assert run(recorder, folder, {"0005": 0.2, "0006": 0.3}, epochs=5) == ["0005", "0006"]


def test_a_trial_whose_reports_are_lost_does_not_go_on_to_a_later_end(folder):
    study = load(folder)
    study = study.with_spec(dataclasses.replace(study.spec, trials=3))
    recorder = Recorder(study)
    run(recorder, folder, VALUES)
    recorder.close()
    (trial_folder(folder, "0001") / HISTORY).unlink()  # as the error about a damaged history advises
    raise_epochs(study, dataclasses.replace(study.spec, epochs=5))
    assert trials_to_continue(study.optuna) == {"0000"}


def test_the_command_that_has_raised_the_epochs_may_be_typed_again(folder):
    """It was interrupted before the trials that go on have begun, and names the number of trials of before."""
    run(Recorder(load(folder)), folder, VALUES)
    study = load(folder)
    longer = dataclasses.replace(study.spec, epochs=5, trials=4)
    go_on(study, longer)
    study = load(folder)
    again = go_on(study, dataclasses.replace(study.spec, epochs=5, trials=4))
    recorder = Recorder(again)
    assert run(recorder, folder, dict.fromkeys(("0004", "0005", "0006"), 0.1), epochs=5) == ["0004", "0005", "0006"]
    assert go_on(again, dataclasses.replace(again.spec, trials=9)).spec.trials == 9


def test_a_trial_keeps_its_weights_until_the_one_that_continues_it_has_copied_them(folder):
    run(Recorder(load(folder)), folder, VALUES)
    study = load(folder)
    recorder = Recorder(raise_epochs(study, dataclasses.replace(study.spec, epochs=5)))
    # 0004 and 0005 end better than 0000, which 0006 continues.
    assert run(recorder, folder, dict.fromkeys(("0004", "0005", "0006"), 0.1), epochs=5) == ["0004", "0005", "0006"]
    records = {record.trial_id: record for record in load(folder).records()}
    assert records["0006"].continues == "0000"
    assert records["0006"].reports[:3] == records["0000"].reports
    assert not (trial_folder(folder, "0000") / LAST).exists(), "nothing needs them any more"


def test_a_trial_whose_driver_died_after_it_copied_a_finished_trial_goes_on(folder):
    """Its history ends with the finished report of the trial that it continues."""
    run(Recorder(load(folder)), folder, VALUES)
    study = load(folder)
    raise_epochs(study, dataclasses.replace(study.spec, epochs=5))
    begun = Recorder(load(folder)).next()
    assert load(folder).record("0004").reports[-1]["finished"]
    recorder = Recorder(load(folder))
    assert statuses(folder)["0004"] == "running"
    assert recorder.next() == begun
    reports = train(folder, "0004", 0.05, epochs=5)
    assert [recorder.report("0004", report) for report in reports] == [True, False]
    assert statuses(folder)["0004"] == "complete"


def test_start_points_that_still_wait_take_no_place_from_trials_that_go_on(tmp_path, store):
    space = {**SPACE, "start": [{"optim.lr": lr} for lr in (1e-3, 2e-3, 3e-3)]}
    folder = tmp_path / "study"
    make_study(folder, spec_of(store, space=space, trials=2, epochs=3))
    run(Recorder(load(folder)), folder, VALUES)
    study = load(folder)
    longer = raise_epochs(study, dataclasses.replace(study.spec, epochs=5))
    assert longer.spec.trials == 5, "two that have ended, one start point, and two that go on"
    assert go_on(longer, dataclasses.replace(longer.spec, trials=2)).spec.trials == 5
    run(Recorder(longer), folder, VALUES, epochs=5)
    assert [record.continues for record in longer.records()[3:]] == ["0001", "0000"]


def test_a_study_at_another_place_is_there_before_a_trial_begins(folder, tmp_path):
    there = tmp_path / "there"
    recorder = Recorder(load(folder, Folder(there)))
    proposal = recorder.next()
    with read_study(Remote(there.as_uri())) as study:
        assert (study.folder / JOURNAL).read_bytes() == (folder / JOURNAL).read_bytes()
        assert {record.trial_id: record.status for record in study.records()} == {proposal.trial_id: "running"}


def test_a_trial_that_is_given_back_goes_on_before_others_begin(folder):
    recorder = Recorder(load(folder))
    first, _ = recorder.next(), recorder.next()
    reports = train(folder, first.trial_id, 0.3)
    assert recorder.report(first.trial_id, next(reports))
    recorder.give_back(first.trial_id)
    assert recorder.count_open() == 4
    assert not recorder.is_over
    assert recorder.next() == first
    assert [recorder.report(first.trial_id, report) for report in reports] == [True, False]
    recorder.close()
    assert [(r.status, len(r.reports)) for r in load(folder).records()] == [("complete", 3), ("running", 0)]
