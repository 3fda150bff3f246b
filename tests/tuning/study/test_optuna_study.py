import errno
import os
import threading

import optuna
import pytest
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import TrialState

from raytune_emotion.errors import UserError
from raytune_emotion.tuning.policy.trial_attributes import RESUMED_IN, TAKEN_UP, is_paused
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.database import join_address
from raytune_emotion.tuning.study.optuna_study import JOURNAL, create_study, list_trials, load_study, study_lock
from raytune_emotion.tuning.study.spec import write_spec
from tests.support.reports import short_report
from tests.support.studies import SEARCH_SPACE, SPACE_BACKBONES, searcher_of, spec_of


@pytest.fixture
def space():
    return parse_space(SEARCH_SPACE, "space")


def run_trial(searcher, proposal):
    """A made-up trial: its loss is a function of what was proposed."""
    js = abs(proposal.settings["optim.lr"] - 2e-3) * 100 + proposal.settings["loss.mse"] / 10
    if proposal.settings["model.backbone"] == "test_vit":
        searcher.observe(proposal.trial_id, short_report(1, js + 0.2))
        searcher.tell(proposal.trial_id, "pruned")
    else:
        searcher.observe(proposal.trial_id, short_report(1, js + 0.1))
        searcher.observe(proposal.trial_id, short_report(2, js, finished=True))
        searcher.tell(proposal.trial_id, "complete")


def test_each_ending_keeps_its_name(tmp_path, space):
    study = create_study(tmp_path, space)
    searcher = searcher_of(study, space, seed=0)
    full, stopped, broken, open_ = (searcher.ask() for _ in range(4))
    for trial, values in ((full, (0.5, 0.3, 0.4)), (stopped, (0.6,))):
        for step, js in enumerate(values, start=1):
            searcher.observe(trial.trial_id, short_report(step, js))
    searcher.tell(full.trial_id, "complete")
    searcher.tell(stopped.trial_id, "pruned")
    searcher.tell(broken.trial_id, "failed", reason="the loss is not a number")

    told = load_study(tmp_path).trials
    assert [t.state for t in told] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    assert told[0].value == 0.3
    assert told[0].intermediate_values == {1: 0.5, 2: 0.3, 3: 0.4}
    assert told[1].value == 0.6
    records = list_trials(load_study(tmp_path))
    assert [r.status for r in records] == ["complete", "pruned", "failed", "running"]
    assert records[2].reason == "the loss is not a number"
    assert records[0].settings == full.settings
    assert full.settings["loss.kl"] == pytest.approx(1.0)
    assert records[3].trial_id == open_.trial_id == "0003"


def test_a_study_that_was_broken_off_proposes_what_the_whole_one_does(tmp_path, space):
    proposals = {}
    for name, sessions in (("whole", [14]), ("broken", [3, 6, 5])):
        folder = tmp_path / name
        folder.mkdir()
        create_study(folder, space)
        proposals[name] = []
        for trials in sessions:
            searcher = searcher_of(load_study(folder), space, seed=5)
            for _ in range(trials):
                proposals[name].append(searcher.ask())
                run_trial(searcher, proposals[name][-1])
    assert proposals["whole"] == proposals["broken"]
    assert len({p.settings["optim.lr"] for p in proposals["whole"]}) == 14


def test_a_region_that_fails_is_left(tmp_path):
    # Nothing but the failures tells the batch sizes apart.
    space = parse_space(
        {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "train.batch_size": {"choice": [32, 64, 128, 256]}}, "space"
    )
    searcher = searcher_of(create_study(tmp_path, space), space, seed=0)
    sizes = []
    for _ in range(40):
        proposal = searcher.ask()
        sizes.append(proposal.settings["train.batch_size"])
        if sizes[-1] >= 128:
            searcher.tell(proposal.trial_id, "failed", reason="out of memory")
        else:
            searcher.observe(proposal.trial_id, short_report(1, 0.3 + len(sizes) % 7 / 100, finished=True))
            searcher.tell(proposal.trial_id, "complete")
    # One half of all by chance.
    assert sum(size >= 128 for size in sizes[:4]) >= 2
    assert sum(size >= 128 for size in sizes[-20:]) <= 4


def test_no_configuration_is_proposed_twice_and_a_small_space_ends(tmp_path):
    space = parse_space({"train.batch_size": {"choice": [16, 32, 64]}, "optim.name": {"choice": ["adam", "sgd"]}})
    searcher = searcher_of(create_study(tmp_path, space), space, seed=0)
    proposed = []
    while (proposal := searcher.ask()) is not None:
        proposed.append(tuple(proposal.settings.values()))
        searcher.observe(proposal.trial_id, short_report(1, 0.3, finished=True))
        searcher.tell(proposal.trial_id, "complete")
    assert len({*proposed}) == len(proposed) == 6


def test_another_seed_proposes_something_else(tmp_path, space):
    rates = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        searcher = searcher_of(create_study(folder, space), space, seed=seed)
        searcher.ask()  # the start point
        rates.append(searcher.ask().settings["optim.lr"])
    assert rates[0] != rates[1]


def test_a_running_trial_is_taken_up_with_the_reports_that_are_missing(tmp_path, space):
    first = searcher_of(create_study(tmp_path, space), space, seed=0)
    proposal = first.ask()
    first.observe(proposal.trial_id, short_report(1, 0.5))

    second = searcher_of(load_study(tmp_path), space, seed=0)
    assert second.resume(proposal.trial_id) == proposal
    for step, js in ((1, 0.5), (2, 0.4)):
        second.observe(proposal.trial_id, short_report(step, js))
    second.tell(proposal.trial_id, "complete")
    (trial,) = load_study(tmp_path).get_trials(states=(TrialState.COMPLETE,))
    assert trial.intermediate_values == {1: 0.5, 2: 0.4}


class Torn:
    """A space whose suggestion is cut short: the process is killed before the settings are recorded."""

    def suggest(self, trial):
        trial.suggest_categorical("model.backbone", SPACE_BACKBONES)
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [0, 1, 10], ids=["start point", "random", "by the model"])
def test_a_trial_whose_asking_was_cut_short_is_what_it_was_to_be(tmp_path, space, before):
    proposals = []
    for name in ("whole", "torn"):
        folder = tmp_path / name
        folder.mkdir()
        searcher = searcher_of(create_study(folder, space), space, seed=5)
        for _ in range(before):
            run_trial(searcher, searcher.ask())
        if name == "torn":
            searcher._space = Torn()
            with pytest.raises(KeyboardInterrupt):
                searcher.ask()
            searcher = searcher_of(load_study(folder), space, seed=5)
            searcher.finish_asking()
            (record,) = [r for r in list_trials(load_study(folder)) if r.status == "running"]
            proposals.append(searcher.resume(record.trial_id))
        else:
            proposals.append(searcher.ask())
    assert proposals[0] == proposals[1]


def test_a_paused_trial_that_is_only_to_be_ended_is_not_taken_up(tmp_path, space):
    study = create_study(tmp_path, space)
    searcher = searcher_of(study, space, seed=0)
    for to_train, taken_up in ((True, 1), (False, 0)):
        trial_id = searcher.ask().trial_id
        searcher.observe(trial_id, short_report(1, 0.3))
        searcher.pause(trial_id, 1.0)
        searcher.resume(trial_id, to_train=to_train)
        trial = study.trials[int(trial_id)]
        assert (trial.user_attrs.get(TAKEN_UP, 0), is_paused(trial)) == (taken_up, not to_train)
        searcher.tell(trial_id, "pruned")


def test_what_resuming_a_trial_cost_is_recorded_with_its_report(tmp_path, space):
    searcher = searcher_of(create_study(tmp_path, space), space)
    trial_id = searcher.ask().trial_id
    searcher.observe(trial_id, short_report(1, 0.3))
    searcher.pause(trial_id, 50.0)
    searcher.resume(trial_id)
    searcher.observe(trial_id, {**short_report(2, 0.3), "resumed_in": 2.5})
    searcher.observe(trial_id, short_report(3, 0.3))
    assert load_study(tmp_path).trials[int(trial_id)].user_attrs[RESUMED_IN] == 2.5


def test_a_renamed_folder_is_still_its_study(tmp_path, space):
    (tmp_path / "old").mkdir()
    create_study(tmp_path / "old", space)
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_study(tmp_path / "new").study_name == "old"


def test_a_folder_without_a_study_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="not a study"):
        load_study(tmp_path)


def test_study_whose_database_is_away_is_a_clear_error(tmp_path, store):
    write_spec(tmp_path, spec_of(store, storage="postgresql://127.0.0.1:1/studies#first"))
    with pytest.raises(UserError, match=r"^postgresql://127\.0\.0\.1:1/studies: cannot be opened \("):
        load_study(tmp_path)


def test_study_that_its_database_does_not_have_is_a_clear_error(tmp_path, store, postgres, space):
    address = join_address(postgres.new_database(), "first")
    create_study(tmp_path, space, address=address)
    write_spec(tmp_path, spec_of(store, storage=address.replace("first", "second")))
    with pytest.raises(UserError, match=r"#second: damaged \(KeyError"):
        load_study(tmp_path)
    write_spec(tmp_path, spec_of(store, storage=address))
    assert load_study(tmp_path).study_name == "first"


def test_optuna_itself_reads_the_journal(tmp_path, space):
    create_study(tmp_path, space)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
    )
    assert [s.study_name for s in optuna.get_all_study_summaries(storage)] == [tmp_path.name]


def test_a_trial_shows_the_weights_of_its_losses_and_the_study_the_name_of_its_values(tmp_path, space):
    """The parameters of a mixture, `loss.kl~` and so on, tell nobody what the weights are."""
    study = create_study(tmp_path, space)
    proposal = searcher_of(study, space).ask()
    study = load_study(tmp_path)
    weights = {name: value for name, value in study.trials[0].user_attrs.items() if name.startswith("loss.")}
    assert weights == {name: value for name, value in proposal.settings.items() if name.startswith("loss.")}
    assert weights.keys() == {"loss.kl", "loss.js", "loss.mse"}
    assert study.metric_names == ["best validation JS, bits"]


def test_a_study_is_driven_by_one_process(tmp_path, space):
    study = create_study(tmp_path, space)
    lock = tmp_path / f"{JOURNAL}.lock"
    lock.symlink_to(tmp_path / JOURNAL)  # as a process leaves it that is killed while it writes
    with study_lock(tmp_path) as drivers, drivers.turn("trials"):
        assert not lock.is_symlink()
        searcher_of(study, space, seed=0).ask()
        with pytest.raises(UserError, match="another process is using it"), study_lock(tmp_path):
            pass
    with study_lock(tmp_path):
        assert len(list_trials(study)) == 1


def test_a_line_that_a_full_disk_has_torn_is_cut_off(tmp_path, space):
    with study_lock(tmp_path):
        searcher_of(create_study(tmp_path, space), space, seed=0).ask()
    journal = tmp_path / JOURNAL
    written = journal.read_bytes()
    journal.write_bytes(written + b'{"op_code": 6, "trial_id"')
    with study_lock(tmp_path) as drivers:
        assert journal.read_bytes() != written, "another driver may be writing where the file system has no locks"
        with drivers.turn("trials"):
            assert journal.read_bytes() == written
        searcher_of(load_study(tmp_path), space, seed=0).ask()
    assert [each.status for each in list_trials(load_study(tmp_path))] == ["running", "running"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [],
        lambda lines: [b'{"op_code": 0, "study_name"', *lines[1:]],
        lambda lines: [lines[0], b"\xff\n", *lines[1:]],
        lambda lines: [lines[0], b"{}\n", *lines[1:]],
        # Optuna alone would find this one at the next change.
        lambda lines: [*lines[:-1], lines[-1][:-9] + b"\x00" * 8 + b"\n"],
        lambda lines: [line.replace(b"FloatDistribution", b"FloatDistributio-") for line in lines],
    ],
)
def test_a_damaged_journal_is_a_clear_error(tmp_path, space, damage):
    searcher_of(create_study(tmp_path, space), space, seed=0).ask()
    journal = tmp_path / JOURNAL
    journal.write_bytes(b"".join(damage(journal.read_bytes().splitlines(keepends=True))))
    with pytest.raises(UserError, match=r"damaged .*restore it from a copy"):
        load_study(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EPERM])
def test_study_lies_on_a_drive_without_symbolic_links(tmp_path, space, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "symlink", refuse)
    study = create_study(tmp_path, space)
    with study_lock(tmp_path):
        trial = load_study(tmp_path).ask()
        study.tell(trial.number, 0.5)
    assert [trial.value for trial in load_study(tmp_path).trials if trial.value is not None] == [0.5]


def test_journal_lock_respects_that_of_other_programs(tmp_path, space):
    """Optuna's dashboard takes a symbolic link when a person writes a note."""
    create_study(tmp_path, space)
    theirs = JournalFileSymlinkLock(str(tmp_path / JOURNAL))
    ours = load_study(tmp_path)
    theirs.acquire()
    thread = threading.Thread(target=ours.ask, daemon=True)
    try:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    finally:
        theirs.release()
    thread.join(60)
    assert not thread.is_alive()
