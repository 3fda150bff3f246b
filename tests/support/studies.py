"""Studies, their spaces and their records, made without Ray."""

import atexit
import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

from raytune_emotion.data.store import open_store
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST
from raytune_emotion.storage.atomic import LOCK
from raytune_emotion.tuning.execution.job import Job, job_of, train_here
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.policy.decisions import FORECAST
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.objective import JS_ALONE
from raytune_emotion.tuning.policy.policies import make_policy, make_sampler_of
from raytune_emotion.tuning.space.parser import load_space
from raytune_emotion.tuning.study.optuna_study import JOURNAL, Searcher, create_study
from raytune_emotion.tuning.study.records import read_records
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, read_spec, write_spec
from raytune_emotion.tuning.study.tables import write_tables
from raytune_emotion.tuning.study.trials import trial_folder
from tests.support.folders import SCRATCH
from tests.support.reports import make_report

ONE_CORE = Resources(1, 1.0, 0.0)

SMALL_SPACE = """\
model.backbone: {choice: [test_resnet, test_vit]}
optim.lr: {log_uniform: [1e-3, 1e-2]}
loss: {simplex: [kl, js]}
data.image_size: 32
"""


SPACE_BACKBONES = ["test_resnet", "test_vit"]


SEARCH_SPACE = {
    "model.backbone": {"choice": SPACE_BACKBONES},
    "optim.lr": {"log_uniform": [1e-4, 1e-2]},
    "loss": {"simplex": ["kl", "js", "mse"]},
    "when": [{"if": {"model.backbone": ["test_vit"]}, "optim.lr": {"log_uniform": [1e-5, 1e-3]}}],
    "start": [{"model.backbone": "test_resnet", "optim.lr": 1e-3, "loss.kl": 1.0}],
}


def spec_of(store, **changes):
    """Make the specification of a study of this store, with these changes."""
    spec = StudySpec(
        name="a study",
        seed=3,
        objective="val_js",
        sampler="forecast",
        scheduler="asha",
        trials=4,
        epochs=2,
        concurrency=None,
        workers_per_trial=1,
        gpus_per_worker=None,
        max_failures=3,
        data="faces",
        stores={store.image_size: str(store.path)},
        fingerprints={store.image_size: store.fingerprint},
        classes=EMOTIONS,
        weights_dir=None,
        space={"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "loss": {"simplex": ["kl", "js"]}},
        baseline={"js": 0.4, "kl": 1.2},
    )
    return dataclasses.replace(spec, **changes)


def write_study(folder: Path, store, *, trials: int = 3, epochs: int = 2) -> StudySpec:
    """Write a study as `search` does, without Ray: run its trials here, one after the other, all to their end.

    Once: a further study of as many trials on the same data is a copy of another name.
    """
    shutil.copytree(_trained_study(store.path, trials, epochs), folder)
    (folder.parent / "space.yaml").write_text(SMALL_SPACE)
    spec = dataclasses.replace(read_spec(folder), name=folder.name)
    (folder / SPEC).unlink()  # else the copy would be the same study, by the time when it was created
    write_spec(folder, spec)
    return spec


@functools.cache
def _trained_study(data: Path, trials: int, epochs: int) -> Path:
    work = tempfile.TemporaryDirectory(prefix="raytune_emotion-", dir=SCRATCH)
    atexit.register(work.cleanup)
    folder, store = Path(work.name) / "study", open_store(data)
    folder.mkdir()
    (folder.parent / "space.yaml").write_text(SMALL_SPACE)
    space = load_space(folder.parent / "space.yaml", overrides={"train.epochs": epochs})
    spec = spec_of(
        store,
        name=folder.name,
        seed=0,
        trials=trials,
        epochs=epochs,
        classes=store.classes,
        space=space.to_dict(),
        baseline={"js": 0.44, "kl": 1.2},
    )
    study = create_study(folder, space)
    write_spec(folder, spec)
    (folder / LOCK).touch()
    searcher = searcher_of(study, space, seed=0)
    for _ in range(trials):
        proposal = searcher.ask()
        trial = trial_folder(folder, proposal.trial_id)
        settings = spec.settings(proposal.settings)
        for report in train_here(Job(proposal.trial_id, str(trial), str(store.path), settings, ONE_CORE)):
            searcher.observe(proposal.trial_id, report)
        searcher.tell(proposal.trial_id, "complete")
    write_tables(folder, read_records(folder, study))
    return folder


def forget_last_ending(folder: Path) -> None:
    """Leave the last trial of a study of `write_study` before its end, as by a time budget."""
    journal = folder / JOURNAL
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))


def run_here(study, resources=ONE_CORE, watch=lambda event: None):
    """Run what is left of a study without Ray: in this process, one trial after the other."""
    recorder = Recorder(study, watch)
    try:
        while (proposal := recorder.next()) is not None:
            with contextlib.closing(train_here(job_of(study, resources, proposal))) as reports:
                for report in reports:
                    if not recorder.report(proposal.trial_id, report):
                        break
    finally:
        recorder.close()
    return study.records()


def train(folder, trial_id, js, *, epochs=3, time=0.0):
    """Write what a trial's process writes, an epoch at a time; yield what the driver hears."""
    place = trial_folder(folder, trial_id)
    place.mkdir(parents=True, exist_ok=True)
    history = place / HISTORY
    done = len(history.read_text().splitlines()) if history.exists() else 0
    for epoch in range(done + 1, epochs + 1):
        report = make_report(epoch, js, finished=epoch == epochs, time=time + epoch, images_per_second=100.0)
        with history.open("a") as file:
            file.write(json.dumps(report) + "\n")
        for name in (BEST, LAST):
            (place / name).write_bytes(b"weights")
        yield report


def searcher_of(study, space, *, seed=0, scheduler="none", objective=JS_ALONE, epochs=4, earlier=()):
    """Make what asks an Optuna study for trials, as the recorder of a study makes it."""
    inputs = PolicyInputs(space, epochs, epochs, seed, objective, earlier)
    policy, sampler = make_policy(inputs, scheduler=scheduler), make_sampler_of(inputs, FORECAST)
    return Searcher(study, space, policy, sampler=sampler, cost=objective.cost)
