"""Record the results of a study's trials, and decide what runs next, without Ray.

Whoever runs trials calls `next` for each free place, `report` for each report and `end` for a trial that failed. Nobody
else writes the record of a running study.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.known_errors import is_disk_full
from raytune_emotion.learn.report import DriverReport
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST, PREDICTIONS, read_history
from raytune_emotion.tuning.execution.backlog import Backlog
from raytune_emotion.tuning.execution.gain_watch import GainWatch
from raytune_emotion.tuning.policy.decisions import Decision, Gain, Limits, Prune
from raytune_emotion.tuning.policy.gain import GainForecast
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.policies import make_policy, make_sampler_of
from raytune_emotion.tuning.policy.warm_start import read_earlier
from raytune_emotion.tuning.study.endings import Broken, Complete, Ending, Failed, Paused, Pruned
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import (
    JOURNAL,
    Proposal,
    Searcher,
    Status,
    StudyTrial,
    raised_before,
    trials_to_continue,
)
from raytune_emotion.tuning.study.records import (
    TrialRecord,
    copy_checkpoint,
    delete_weights,
    trials_to_strip,
)
from raytune_emotion.tuning.study.remote_copy import TAKEN_OVER
from raytune_emotion.tuning.study.tables import Tables
from raytune_emotion.tuning.study.trials import trial_file, trial_id_of

#: Number of consecutive failed trials that ends a study.
MAX_FAILURES_IN_A_ROW = 10
#: Longest time for which the location of a study lacks an ending, seconds.
_SAVE_S = 5.0
#: Seconds between two checks whether another process has taken over a study at a URI.
_LOOK_S = 30.0

_STARTS_ANEW = "starts anew, as its checkpoint is gone or damaged"

#: How a trial ends by each decision of the policy; None if it continues.
_ENDINGS: dict[Decision, Ending | None] = {"go on": None, "pause": Paused(), "stop": Pruned()}
_STATUS: dict[type, Status] = {Complete: "complete", Pruned: "pruned", Failed: "failed", Paused: "paused"}


@dataclass(frozen=True)
class Event:
    """An event of a trial, for watches."""

    proposal: Proposal
    status: Status
    report: DriverReport | None  # the part of the latest report that is sent to the driver
    reason: str
    gain: Gain | None = None  # that is expected of further training; None where it is not known
    elsewhere: bool = False  # whether another driver has run the trial

    @property
    def worker(self) -> str:
        """Return the process that sent the report, as `host:pid`; an empty string if it is unknown."""
        sent: Mapping[str, object] = self.report or {}
        return f"{sent['host']}:{sent['pid']}" if "host" in sent and "pid" in sent else ""


T = TypeVar("T")
Watch = Callable[[Event], None]


class Recorder:
    """Keep the record of one running study.

    An error of the record ends the study, and `broken` says why: nothing may be written behind a journal's torn line.
    """

    def __init__(
        self,
        study: OpenStudy,
        watch: Watch = lambda event: None,
        *,
        until_gain: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Continue the record. No trial begins once the expected gain is below `until_gain`."""
        self._study, self._watch, self._lock = study, watch, threading.RLock()
        inputs = _inputs_of(study)
        self._tables = Tables(study)
        self._saving = _Saving(study, self._tables, clock)
        self._searcher = _searcher_of(study, inputs)
        self._gain = GainWatch(self._searcher, _gain_forecast_of(study, inputs), until=until_gain, clock=clock)
        self._backlog = Backlog(study, clock)
        self._closed, self._failures = False, 0  # failures in a row, of the trials that ended last
        self.broken = ""  # why the study cannot go on
        self.error: Exception | None = None  # the cause
        self._run_or_break(self._take_up, None)

    def _take_up(self) -> None:
        """Continue the trials of an earlier session."""
        with self._study.drivers.turn("trials"):
            self._searcher.finish_asking()
            self._study.claim()
            records = self._study.records()
            self._tables.keep([record for record in records if record.ended])
            self._searcher.replay(records)
            for trial_id in self._look_around():
                self._take_up_trial(self._study.record(trial_id))
        self._gain.update()

    def _look_around(self) -> list[str]:
        """Read the trials that other drivers have ended. Return the ids of the trials that they have abandoned."""
        self._searcher.finish_asking()
        ended_elsewhere, abandoned = self._backlog.look({record.trial_id for record in self._tables.ended})
        for trial in ended_elsewhere:
            record = self._tables.add(trial.trial_id)
            self._searcher.replay([record])
            self._watch(_event_elsewhere(trial, record, self._gain.value))
        if ended_elsewhere:
            self._saving.delete_needless()
        return [trial.trial_id for trial in abandoned]

    def _take_up_trial(self, record: TrialRecord) -> None:
        proposal = self._searcher.resume(record.trial_id)
        for report in record.reports:
            self._searcher.observe(record.trial_id, report)
        if ending := _unrecorded_ending(record, self._searcher, self._backlog.limits):
            self._end(proposal, ending, record.reports[-1])
        else:
            self._backlog.requeue(record.trial_id)

    @property
    def is_over(self) -> bool:
        """Tell whether no trial runs and none can run now."""
        return bool(self.broken) or self._closed or self._backlog.is_over

    @property
    def waits(self) -> bool:
        """Tell whether this driver waits for trials of other drivers."""
        return self._backlog.waits

    @property
    def shortfall(self) -> str:
        """Say that the gain is too small; "" if it is sufficient or unknown."""
        return self._gain.shortfall

    def count_open(self) -> int:
        """Return the number of trials that could run here at once if there were room for all of them."""
        return self._backlog.count_open()

    def next(self) -> Proposal | None:
        """Begin or resume a trial; return None if there is nothing to run now."""
        return self._run_or_break(self._next, None)

    def report(self, trial_id: str, report: DriverReport) -> bool:
        """Record a report. Return whether the trial continues; if not, its ending or its pause is recorded."""
        return self._run_or_break(lambda: self._report(self._backlog.proposal_of(trial_id), report), False)

    def end(self, trial_id: str, ending: Failed | Broken) -> None:
        """Record that a trial ended without a report."""
        self._run_or_break(lambda: self._end(self._backlog.proposal_of(trial_id), ending, None), None)

    def give_back(self, trial_id: str) -> None:
        """Let a running trial continue in another process: `next` returns it first."""
        self._run_or_break(lambda: self._backlog.give_back(trial_id), None)

    def write_in_time(self) -> None:
        """Save an ending after a few seconds. Write the tables if they lack one, unless they were written just now."""
        self._run_or_break(self._saving.write_in_time, None)

    def check(self) -> None:
        """Stop here if the other drivers consider this one dead, because they may have taken its trials."""
        if not self._closed and (fault := self._study.drivers.failure()):
            with self._lock:
                self.broken = self.broken or fault

    def close(self) -> None:
        """Write the tables, and record nothing any more. If the study is over, its paused trials end as pruned.

        Raises:
            Breakdown: why the study cannot go on, and how it is resumed.
        """
        with self._lock:
            self._run_or_break(self._conclude, None)
            self._run_or_break(self._saving.write, None)
            if isinstance(self.error, _StudyEnds):
                # The record is complete, but the disk may be full, or the URI unreachable.
                with contextlib.suppress(OSError, Breakdown):
                    self._saving.write()
            self._closed = True
            if self.error is not None and not isinstance(self.error, Breakdown | UserError | OSError):
                raise self.error
            if self.broken:
                raise Breakdown(self.broken + _what_next(self.broken, self._study)) from self.error

    def _run_or_break(self, action: Callable[[], T], otherwise: T) -> T:
        """Run an action, unless the record is closed or broken; an error breaks it."""
        with self._lock:
            self.check()
            if self.broken or self._closed:
                return otherwise
            try:
                return action()
            except Exception as error:
                # If it were raised here, Ray Tune would take it for a failure of the trial.
                self.broken, self.error = _reason(error, self._study), error
                return otherwise

    def _next(self) -> Proposal | None:
        if self.shortfall or not self._backlog.may_ask or (proposal := self._ask()) is None:
            return None
        self._saving.save()  # the journal at a URI must know a trial before files of the trial are there
        why_anew = _copy_continued(self._study, self._searcher, proposal)
        self._backlog.start(proposal)
        self._watch(Event(proposal, "running", None, why_anew))
        return proposal

    def _ask(self) -> Proposal | None:
        """Choose the trial for a free place, while no other driver of the study chooses."""
        with self._study.drivers.turn("trials"):
            for trial_id in self._look_around() if self._study.drivers.own is not None else ():
                if not self._backlog.has_queue:  # one at a time, because other drivers have free places, too
                    record = self._study.record(trial_id)
                    self._searcher.replay([record])
                    self._take_up_trial(record)
            if (waiting := self._backlog.take()) is not None:
                return self._searcher.resume(waiting)
            while isinstance(answer := self._searcher.ask(self._backlog.limits), Prune):
                self._end(self._searcher.resume(trial_id_of(answer.number), to_train=False), Pruned(), None)
        self._backlog.note_answer(answer)
        return answer

    def _report(self, proposal: Proposal, report: DriverReport) -> bool:
        new = self._searcher.observe(proposal.trial_id, report)
        self._backlog.wake()
        # A report that arrives twice, as after the death of a process, leads to no decision.
        asks = new and not report["finished"]
        decision = self._searcher.decide(proposal.trial_id, report, self._backlog.limits) if asks else "go on"
        ending = Complete() if report["finished"] else _ENDINGS[decision]
        if ending is not None:
            self._end(proposal, ending, report)
        else:
            anew = report["report"] == 1 < self._searcher.last_report(proposal.trial_id)
            self._watch(Event(proposal, "running", report, _STARTS_ANEW if anew else ""))
        return ending is None

    def _end(self, proposal: Proposal, ending: Ending, report: DriverReport | None) -> None:
        """Record an ending. All endings are recorded here."""
        trial_id = proposal.trial_id
        if isinstance(ending, Broken):
            # Optuna is not told, because the trial continues when the study is resumed.
            raise _StudyEnds(ending.reason)
        status, reason = _STATUS[type(ending)], getattr(ending, "reason", "")
        if isinstance(ending, Paused):
            assert report is not None
            self._searcher.pause(trial_id, report["seconds"])
            self._backlog.pause(trial_id)
        else:
            self._backlog.end(trial_id)
            self._searcher.tell(trial_id, status, reason=reason, seconds=report["seconds"] if report else None)
            self._tables.add(trial_id)
        self._gain.update()
        self._saving.note_ending()
        self._watch(Event(proposal, status, report, reason, self._gain.value))
        self._failures = self._failures + 1 if isinstance(ending, Failed) else 0
        if self._failures == MAX_FAILURES_IN_A_ROW:
            raise _StudyEnds(f"{MAX_FAILURES_IN_A_ROW} trials have failed one after the other, the last one: {reason}")

    def _conclude(self) -> None:
        if self.is_over:
            with self._study.drivers.turn("trials"):
                self._look_around()  # another driver may have come meanwhile
                for trial_id in self._backlog.paused():
                    self._end(self._searcher.resume(trial_id, to_train=False), Pruned(), None)
        self._gain.update(now=True)


def _what_next(broken: str, study: OpenStudy) -> str:
    """Tell the user how to continue a broken study; "" if another process has continued it."""
    if broken.endswith(TAKEN_OVER):
        return ""
    return f"; the study can be resumed: {study.copy}" if study.copy.is_whole else "; type the same command again"


def _event_elsewhere(trial: StudyTrial, record: TrialRecord, gain: Gain | None) -> Event:
    """Return the event of a trial that another driver has ended."""
    proposal = Proposal(trial.trial_id, trial.settings, trial.continues)
    last = record.reports[-1] if record.reports else None
    return Event(proposal, trial.status, last, trial.reason, gain, elsewhere=True)


def _unrecorded_ending(record: TrialRecord, searcher: Searcher, limits: Limits) -> Ending | None:
    """Return the ending or pause that a dead driver did not record; None if the trial goes on."""
    if not record.reports:
        return None
    last = record.reports[-1]
    if last["finished"]:
        # The finished report may be that of the trial that this one continues.
        return Complete() if record.continues is None else None
    return _ENDINGS[searcher.decide_again(record.trial_id, last, limits)]


def _copy_continued(study: OpenStudy, searcher: Searcher, proposal: Proposal) -> str:
    """Copy the checkpoint of the continued trial to the trial that continues it, unless that has begun.

    Returns:
        Why it starts anew instead; empty where it does not.
    """
    source, target = proposal.continues, proposal.trial_id
    if source is None or study.copy.has(trial_file(target, LAST)):
        return ""
    names = (HISTORY, BEST, LAST)
    if not all(study.copy.has(trial_file(source, name)) for name in names):
        return f"starts anew, as the checkpoint of trial {source}, which it was to go on from, is gone"
    study.copy.pull(trial_file(source, name) for name in (*names, PREDICTIONS))
    copied = copy_checkpoint(study.trial_folder(source), study.trial_folder(target))
    study.copy.push(*(trial_file(target, name) for name in copied))
    for report in read_history(study.trial_folder(target)):
        searcher.observe(target, report)
    return ""


class _Saving:
    """Bring a study's location up to date, and then delete weights that are not needed any more."""

    def __init__(self, study: OpenStudy, tables: Tables, clock: Callable[[], float]) -> None:
        self._study, self._tables, self._clock = study, tables, clock
        self._since: float | None = None  # time of the first ending that the location lacks
        self._looked = clock()  # time of the last check whether another process has taken the study over
        self._deleted: set[str] = set()  # trials without weights

    def note_ending(self) -> None:
        """Note that a trial ended or paused. At a URI, the ending is saved with others."""
        self._since = self._clock() if self._since is None else self._since
        self._save_in_time()

    def save(self) -> None:
        """Save the journal. Weights are deleted after that, because a killed driver's trials are resumed from it."""
        self._study.copy.push_journal()
        if self._since is not None:
            self._since = None
            self.delete_needless()

    def _save_in_time(self) -> None:
        if self._since is not None and (self._study.copy.is_here or self._clock() >= self._since + _SAVE_S):
            self.save()

    def write_in_time(self) -> None:
        """Save an ending, and write the tables, if that is due."""
        self._save_in_time()
        self._tables.write_in_time()
        if self._clock() >= self._looked + _LOOK_S:
            self._study.copy.check_driver()
            self._looked = self._clock()

    def write(self) -> None:
        """Save and write everything."""
        self.save()
        self._tables.write()
        self._study.copy.push(JOURNAL)  # as one file, for people and other programs

    def delete_needless(self) -> None:
        """Delete the weights that are not needed any more."""
        study = self._study
        if study.spec.confirms:
            return  # a confirmation chooses in the end; its trials are few
        lost = trials_to_strip(self._tables.ended, study.objective, trials_to_continue(study.optuna))
        gone = [trial_id for trial_id in lost if trial_id not in self._deleted]
        delete_weights(study.folder, gone)
        study.copy.delete([trial_file(trial_id, name) for trial_id in gone for name in (LAST, BEST, PREDICTIONS)])
        self._deleted.update(gone)


class _StudyEnds(Breakdown):
    """Report that the study cannot continue, although its record is complete."""


def _reason(error: Exception, study: OpenStudy) -> str:
    """Say why a record is broken."""
    if isinstance(error, UserError):
        return "; ".join(error.faults)
    if is_disk_full(error):
        return f"{study.folder}: no space left on the disk"
    if isinstance(error, OSError):
        return f"{study.folder}: the record cannot be read or written: {error}"
    return str(error) if isinstance(error, Breakdown) else f"{type(error).__name__}: {error}"


def _inputs_of(study: OpenStudy) -> PolicyInputs:
    """Read the inputs of a study's policy."""
    spec, earlier = study.spec, read_earlier(study.folder)
    raised = raised_before(study.optuna)
    return PolicyInputs(study.space, spec.epochs, study.reports, spec.seed, study.objective, earlier, raised)


def _gain_forecast_of(study: OpenStudy, inputs: PolicyInputs) -> GainForecast | None:
    """Make the forecast of the gain of further training; None for a confirmation, which chooses nothing."""
    return GainForecast(inputs) if study.spec.confirms is None else None


def _searcher_of(study: OpenStudy, inputs: PolicyInputs) -> Searcher:
    """Make the searcher that decides about a study's trials."""
    # A confirmation runs each configuration to its end.
    scheduler = study.spec.scheduler if study.spec.confirms is None else "none"
    policy = make_policy(inputs, sampler=study.spec.sampler, scheduler=scheduler)
    sampler = make_sampler_of(inputs, study.spec.sampler)
    cost, driver = study.objective.cost, study.drivers.own
    return Searcher(study.optuna, study.space, policy, sampler=sampler, cost=cost, driver=driver)
