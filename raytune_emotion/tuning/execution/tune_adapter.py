"""Stand between Ray Tune, which runs trials, and a study."""

import contextlib
import functools
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import SearchAlgorithm

from raytune_emotion.errors import Breakdown
from raytune_emotion.known_errors import is_disk_full
from raytune_emotion.learn.checkpoint import BEST, HISTORY, LAST, read_history
from raytune_emotion.learn.report import Report
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.tuning.execution.cluster import Placement
from raytune_emotion.tuning.execution.job import Job, halved, job_of
from raytune_emotion.tuning.execution.worker_group import release_workers
from raytune_emotion.tuning.policy import sampler
from raytune_emotion.tuning.policy.objective import OBJECTIVES
from raytune_emotion.tuning.policy.scheduler import make_scheduler, replay
from raytune_emotion.tuning.policy.warm_start import EARLIER, read_earlier
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.optuna_study import JOURNAL, Proposal, Searcher, Status, asked, continued
from raytune_emotion.tuning.study.records import (
    TrialRecord,
    copy_checkpoint,
    drop_checkpoints,
    losers,
    read_records,
    trial_folder,
)
from raytune_emotion.tuning.study.spec import SPEC, StudySpec
from raytune_emotion.tuning.study.tables import CURVES, TRIALS, curves_of, joined, thinned, write_tables

#: Says which driver a mirrored study has: the one that began last.
DRIVER = "driver"

#: Of what Ray says of a process that its memory monitor has killed.
_LOW_MEMORY = "running low on memory"

#: So many trials that fail one after the other end a study.
_HOPELESS = 10

#: The tables are written whole: again only after so many times what the last writing took.
_TABLES_REST = 20


@dataclass(frozen=True)
class Event:
    """Something that happened to a trial, for whoever watches."""

    proposal: Proposal
    status: Status
    report: Report | None  # of the newest, what the driver hears
    reason: str


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise Breakdown(f"{folder}: no space left on the disk") from error


def has_last(folder: Path, uri: str | None, trial_id: str) -> bool:
    if uri is None:
        return (trial_folder(folder, trial_id) / LAST).exists()
    return remote.exists(remote.join(uri, "trials", trial_id, LAST))


class Search(SearchAlgorithm):
    """Between Ray Tune, which runs trials, and the study's searcher and folder.

    Ray's trials bear the study's own ids, so that dashboard, logs, rungs and folders speak of the same things.
    """

    def __init__(
        self,
        folder: Path,
        spec: StudySpec,
        placement: Placement,
        study: optuna.Study,
        watch: Callable[[Event], None],
        uri: str | None,
    ) -> None:
        self._folder, self._spec, self._placement, self._study, self._watch = folder, spec, placement, study, watch
        self._uri = uri
        self._token = uuid.uuid4().hex
        self._dropped: set[str] = set()  # trials without weights
        self._objective = OBJECTIVES[spec.objective]
        # From what earlier studies have shown, if the study began with any.
        propose = functools.partial(sampler.propose, earlier=read_earlier(folder), objective=self._objective)
        space = parse_space(spec.space, SPEC)
        self._searcher = Searcher(study, space, seed=spec.seed, propose=propose, cost=self._objective.cost)
        self._live: dict[str, tuple[Proposal, Trial]] = {}
        self._ended: dict[str, TrialRecord] = {}  # thinned: the driver is not to grow with what was reported
        self._curves = curves_of(())  # of the ended
        self._stale = False  # whether the tables lack an ending
        self._tables_due = 0.0
        self._experiment: Experiment | None = None
        self._parser = _make_parser()
        self._failures = 0  # in a row, of the trials that ended last
        self._exhausted = False  # the space has no more than what was tried
        self.broken = ""  # why the study cannot go on

        self._searcher.finish_asking()
        if uri is not None:
            write_text(folder / DRIVER, self._token)
            # The spec comes last: where it is, there is a study.
            remote.push(folder, uri, (DRIVER, JOURNAL, *([EARLIER] if (folder / EARLIER).exists() else []), SPEC))
        records = read_records(folder, study)
        self._asked = len(records)
        self.scheduler: TrialScheduler = (
            FIFOScheduler()  # type: ignore[no-untyped-call]
            if spec.confirms is not None
            else make_scheduler(self._most_reports(), self._objective)
        )
        stopped = replay(self.scheduler, records)
        self._unfinished: deque[str] = deque()
        for record in records:
            if record.status == "running":
                self._take_up(record, stopped=record.trial_id in stopped)

    def _most_reports(self) -> int:
        settings = parse_space(self._spec.space, SPEC).fixed
        return self._spec.epochs * int(settings.get("train.evals_per_epoch", 1))

    def _take_up(self, record: TrialRecord, *, stopped: bool) -> None:
        """Brings Optuna up to what a broken-off trial had reported, and queues the trial unless it had ended."""
        proposal = self._searcher.resume(record.trial_id)
        for report in record.reports:
            self._searcher.observe(record.trial_id, report)
        finished = bool(record.reports) and record.reports[-1]["finished"]
        # What has finished may be the trial that it goes on from.
        if finished and record.continues is None:
            self._end(proposal, "complete", record.reports[-1])
        elif stopped and not finished:
            self._end(proposal, "pruned", record.reports[-1])
        else:
            self._unfinished.append(record.trial_id)

    def add_configurations(self, experiments: Any) -> None:
        (self._experiment,) = experiments

    def is_finished(self) -> bool:
        return self._finished or (not self._unfinished and self._no_more())

    def is_done(self) -> bool:
        """Whether nothing of the study is left to run."""
        return not self._unfinished and not self._live and self._no_more()

    def _no_more(self) -> bool:
        return self._exhausted or self._asked >= self._spec.trials

    def next_trial(self) -> Trial | None:
        # Asked no earlier than a place is free: the sampler then knows all that has ended until now.
        if self.is_finished() or len(self._live) >= self._placement.concurrency:
            return None
        with self._breaking():
            return self._next_trial()
        return None

    def _next_trial(self) -> Trial | None:
        if self._unfinished:
            proposal = self._searcher.resume(self._unfinished.popleft())
        else:
            asked = self._searcher.ask()
            if asked is None:
                self._exhausted = True
                return None
            proposal = asked
            self._asked += 1
        self._push(JOURNAL)
        if proposal.continues and not has_last(self._folder, self._uri, proposal.trial_id):
            self._copy_checkpoint(proposal.continues, proposal.trial_id)
            for report in read_history(trial_folder(self._folder, proposal.trial_id)):
                self._searcher.observe(proposal.trial_id, report)
        assert self._experiment is not None
        job = job_of(self._folder, self._spec, self._placement.resources, proposal, self._uri)
        trial: Trial = _create_trial_from_spec(
            {**self._experiment.spec, "config": job.to_dict()},
            self._parser,
            evaluated_params=proposal.settings,
            experiment_tag=proposal.trial_id,
            trial_id=proposal.trial_id,
        )
        self._live[proposal.trial_id] = proposal, trial
        self._watch(Event(proposal, "running", None, ""))
        return trial

    def _copy_checkpoint(self, source: str, target: str) -> None:
        if self._uri is not None:
            remote.pull(self._uri, self._folder, [f"trials/{source}/{name}" for name in (HISTORY, BEST, LAST)])
        copy_checkpoint(trial_folder(self._folder, source), trial_folder(self._folder, target))
        if self._uri is not None:
            remote.push(self._folder, self._uri, [f"trials/{target}/{name}" for name in (HISTORY, BEST, LAST)])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        proposal, _ = self._live[trial_id]
        if self.broken:
            return  # behind a torn line of the journal nothing may be written
        with self._breaking():
            self._searcher.observe(trial_id, result)
            self._watch(Event(proposal, "running", result, ""))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        proposal, trial = self._live.pop(trial_id)
        if self.broken:
            return
        with self._breaking():
            if error or result is None:
                release_workers(trial_folder(self._folder, trial_id))
                deaths, why = trial.run_metadata.num_failures, _newest_error(trial)
                self._end(proposal, "failed", None, reason=f"its process ended {deaths} times, the last time by: {why}")
            elif "failed" in result:
                self._end(proposal, "failed", None, reason=result["failed"])
            elif "breakdown" in result:
                # Not told to the searcher: the trial goes on when the study does.
                self.broken = result["breakdown"]
            else:
                self._searcher.observe(trial_id, result)
                self._end(proposal, "complete" if result["finished"] else "pruned", result)

    def _end(self, proposal: Proposal, status: Status, report: Report | None, *, reason: str = "") -> None:
        self._searcher.tell(proposal.trial_id, status, reason=reason)
        self._read()
        self._stale = True
        self._push(JOURNAL)
        # A confirmation chooses in the end; its trials are few.
        ended = [] if self._spec.confirms else [*self._ended.values()]
        lost = losers(ended, self._objective, continued(self._study))
        gone = [trial_id for trial_id in lost if trial_id not in self._dropped]
        drop_checkpoints(self._folder, gone)
        if self._uri is not None:
            remote.delete(self._uri, [f"trials/{trial_id}/{name}" for trial_id in gone for name in (LAST, BEST)])
        self._dropped.update(gone)
        self._watch(Event(proposal, status, report, reason))
        self._failures = self._failures + 1 if status == "failed" else 0
        if self._failures == _HOPELESS:
            self.record()
            self.broken = f"{_HOPELESS} trials have failed one after the other, the last one: {reason}"

    def record_in_time(self) -> None:
        """Brings the tables up to the endings that they lack, unless they were written just now."""
        if self._stale and time.monotonic() >= self._tables_due:
            with self._breaking():
                self.record()

    def record(self) -> None:
        """Brings the study's tables, and its mirror, up to all that has happened."""
        began = time.monotonic()
        running = self._read()
        write_tables(self._folder, [*self._ended.values(), *running], joined(self._curves, curves_of(running)))
        self._push(JOURNAL, TRIALS, CURVES)
        self._stale = False
        self._tables_due = time.monotonic() + _TABLES_REST * (time.monotonic() - began)

    def _read(self) -> list[TrialRecord]:
        """Keeps the trials that have ended since it was called before, and returns those that run."""
        if self._uri is not None:
            # What trials of this or other machines have reported.
            running = [t.trial_id for t in asked(self._study) if t.trial_id not in self._ended]
            remote.pull(self._uri, self._folder, [f"trials/{trial_id}/{HISTORY}" for trial_id in running])
        records = read_records(self._folder, self._study, self._ended)
        ended = [record for record in records if record.status != "running"]
        self._curves = joined(self._curves, curves_of(ended))
        self._ended |= {record.trial_id: thinned(record) for record in ended}
        return [record for record in records if record.status == "running"]

    def _push(self, *names: str) -> None:
        if self._uri is None:
            return
        # A driver that was thought dead must not undo what the next one has written.
        driver = remote.read(self._uri, DRIVER)
        if driver != self._token.encode():
            why = "the study is no longer there" if driver is None else "another search has gone on with this study"
            raise Breakdown(f"{remote.shown(self._uri)}: {why}")
        remote.push(self._folder, self._uri, names)

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """Ends the study where what must be written of it cannot be."""
        try:
            with full_disk_told(self._folder):
                yield
        except Breakdown as error:
            self.broken = str(error)


class SmallerBatches(tune.Callback):
    """Has a trial whose process was killed for want of memory go on in smaller micro-batches, where it can."""

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        smaller = halved(Job.from_dict(trial.config)) if _LOW_MEMORY in _newest_error(trial) else None
        if smaller is not None:
            trial.set_config(smaller.to_dict())  # type: ignore[no-untyped-call]


def _newest_error(trial: Trial) -> str:
    """The line that says why a trial's process ended the last time."""
    # Not by the trial's own method, which reads a copy that may be still to be made.
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text(encoding="utf-8") if file is not None and file.exists() else "killed"
    lines = text.rpartition("Failure #")[2].strip().splitlines()
    return next((line for line in lines if _LOW_MEMORY in line), lines[-1])


class TableWriter(TrialProgressCallback):
    """Has the tables written between Tune's events.

    It takes the place of Tune's own report of progress, which prints nothing here but would keep every trial.
    """

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._search = search

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._search.record_in_time()

    def log_result(self, trial: Trial, result: dict[str, Any], error: bool = False) -> None:
        pass

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        pass


class StopWhenBroken(tune.Stopper):
    """Tells Tune when a study cannot go on."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._search.broken)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles it, into a file that nobody reads.
        return {}
