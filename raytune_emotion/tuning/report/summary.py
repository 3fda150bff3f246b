"""Summarise the state of a study, finished or not: as numbers for programs, and as lines for people."""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from optuna.trial import FrozenTrial

from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import Status, expected_gain
from raytune_emotion.tuning.study.records import TrialRecord, best_js_steps, trained_settings, winner
from raytune_emotion.tuning.study.trials import trial_id_of

#: Text about a study whose space has no more configurations.
ALL_TRIED = "every configuration of the space has been tried"

#: Longest time before a trial's reports that counts as its beginning, seconds.
_BEGINNING_S = 60.0
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_LINES = textwrap.TextWrapper(100, subsequent_indent=12 * " ", break_long_words=False, break_on_hyphens=False)


@dataclass(frozen=True)
class BestTrial:
    trial_id: str
    status: Status
    val_js: float  # bits
    epoch: float  # epoch of that evaluation
    settings: dict[str, Any]  # settings that the space chose, with the values of the training


@dataclass(frozen=True)
class Summary:
    """The state of a study. Its fields are the keys of `status --json`, whose names must not change."""

    study: str
    objective: str
    finished: bool  # whether all planned trials have ended, or all configurations of the space
    trials_planned: int
    trials: dict[str, int]  # by status
    best: BestTrial | None
    baseline_js: float | None  # JS of predicting the training mean, bits
    started: float | None  # start of the first trial, seconds since 1970
    elapsed_seconds: float  # since then; for a finished study, until its last trial ended
    active_seconds: float  # part of these in which a trial was running
    trials_per_hour: float | None  # see `per_hour`
    seconds_since_evaluation: float | None
    best_js_by_time: list[tuple[float, float]]  # seconds since the start, lowest JS so far in bits
    expected_gain: Gain | None  # gain of further training; None if unknown
    expected_gain_per_hour: float | None  # the same as a rate, bits


def summarize(study: OpenStudy, records: Sequence[TrialRecord], *, now: float, name: str = "") -> Summary:
    """Summarise a study.

    Args:
        study: the study, opened to read it.
        records: records of its trials.
        now: seconds since 1970.
        name: name of the study; "": its own name.
    """
    spec = study.spec
    begun = [trial for trial in study.optuna.get_trials(deepcopy=False) if trial.datetime_start is not None]
    spans = _spans(begun, records)
    started = min((trial.datetime_start.timestamp() for trial in begun if trial.datetime_start), default=None)
    began = now if started is None else started
    ended = sum(record.ended for record in records)
    finished = ended == len(records) and (ended >= spec.trials or study.has_tried_all())
    ends = [trial.datetime_complete.timestamp() for trial in begun if trial.datetime_complete]
    last = max([*ends, *(end for _, end in spans)], default=now)
    active = _length_of_union(spans)
    leader = winner(records)
    gain = expected_gain(study.optuna)
    heard = [report["time"] for record in records for report in record.reports]
    return Summary(
        study=name or spec.name,
        objective=spec.objective,
        finished=finished,
        trials_planned=spec.trials,
        trials=count_statuses(record.status for record in records),
        best=_best_of(leader, study.copy.location) if leader is not None else None,
        baseline_js=spec.baseline.get("js"),
        started=started,
        elapsed_seconds=max(0.0, (last if finished else now) - began),
        active_seconds=active,
        trials_per_hour=per_hour(ended, active),
        # The clock of a trial's machine may be ahead, and clocks may be set back.
        seconds_since_evaluation=max(0.0, now - max(heard)) if heard else None,
        best_js_by_time=[(max(0.0, time - began), js) for time, js, _ in best_js_steps(records)],
        expected_gain=gain,
        expected_gain_per_hour=gain.per_hour if gain is not None else None,
    )


def count_statuses(statuses: Iterable[Status]) -> dict[str, int]:
    """Count the trials of each status."""
    counts = Counter(statuses)
    return {status: counts[status] for status in get_args(Status)}


def counts_text(trials: Mapping[str, int]) -> str:
    """Write the numbers of trials by status; "" if there is none."""
    return ", ".join(f"{n} {status}" for status, n in trials.items() if n)


def per_hour(ended: int, active_seconds: float) -> float | None:
    """Return the number of ended trials per active hour; None before the first has ended."""
    return ended / active_seconds * 3600 if ended and active_seconds > 0 else None


def time_left(planned: int, ended: int, under_way: Iterable[float], active_seconds: float) -> float | None:
    """Estimate the time for the remaining trials from that of the trials so far; None before one has ended.

    Args:
        planned: number of trials of the study.
        ended: number of ended trials.
        under_way: trained share of each unfinished trial.
        active_seconds: seconds in which trials were running.
    """
    done = ended + sum(under_way)
    return max(0.0, planned - done) * active_seconds / done if ended and active_seconds > 0 else None


def describe(summary: Summary) -> list[str]:
    """Write a summary as lines for people."""
    counts = counts_text(summary.trials) or "none yet"
    all_tried = summary.finished and sum(summary.trials.values()) < summary.trials_planned
    rate = f", {rate_text(summary.trials_per_hour)} an hour" if summary.trials_per_hour is not None else ""
    lines = [
        f"study       {summary.study}" + (", finished" if summary.finished else ""),
        f"trials      {counts}, of {summary.trials_planned}{rate}" + (f"; {ALL_TRIED}" if all_tried else ""),
    ]
    if summary.started is not None:
        since = summary.seconds_since_evaluation
        heard = f", last evaluation {duration(since)} ago" if since is not None and not summary.finished else ""
        lines.append(f"time        {duration(summary.elapsed_seconds)} since the start{heard}")
    if summary.best is None:
        return [*lines, "best JS     no evaluation yet"]
    best = summary.best
    baseline = f"; predicting the training mean: {summary.baseline_js:.4f}" if summary.baseline_js is not None else ""
    lines.append(f"best JS     {best.val_js:.4f} bits, trial {best.trial_id} at epoch {best.epoch:g}{baseline}")
    if summary.best_js_by_time:
        first, lowest = summary.best_js_by_time[0][1], summary.best_js_by_time[-1][1]
        lines.append(f"over time   {sparkline(summary.best_js_by_time)}  {first:.4f} to {lowest:.4f}")
    if summary.expected_gain is not None:
        lines.append(f"gain        {gain_text(summary.expected_gain)}")
    # Lines must not be broken at these spaces.
    settings = ", ".join(f"{name}\N{NO-BREAK SPACE}{value_text(value)}" for name, value in best.settings.items())
    lines += _LINES.wrap(f"settings    {settings}") if settings else []
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def sparkline(points: Sequence[tuple[float, float]], width: int = _WIDTH) -> str:
    """Draw a value over time, with a bar for each part of the time, higher for higher values."""
    values = [value for _, value in points]
    end, highest, lowest = points[-1][0], max(values), min(values)
    bars = []
    for part in range(width):
        until = end * (part + 1) / width
        reached = [value for seconds, value in points if seconds <= until]
        if not reached:
            bars.append(" ")
            continue
        share = (reached[-1] - lowest) / (highest - lowest) if highest > lowest else 0.0
        bars.append(_BARS[round(share * (len(_BARS) - 1))])
    return "".join(bars)


def _best_of(record: TrialRecord, place: Location) -> BestTrial:
    assert record.best is not None
    settings = trained_settings(place, record)
    return BestTrial(record.trial_id, record.status, record.best["val_js"], record.best["epoch"], settings)


def _spans(begun: Iterable[FrozenTrial], records: Iterable[TrialRecord]) -> list[tuple[float, float]]:
    """Return start and end of all times in which a trial was running, from the trials that have begun.

    A trial may continue after a pause of the whole study. So each report counts with the seconds that led to it, and
    with a little more: its process had to begin. The end of a failed trial counts like one more report.
    """
    known = {record.trial_id: record for record in records}
    spans = []
    for trial in begun:
        assert trial.datetime_start is not None
        until, trained, took = trial.datetime_start.timestamp(), 0.0, math.inf
        record = known.get(trial_id_of(trial.number))
        for report in record.reports if record is not None else ():
            took = report["seconds"] - trained + _BEGINNING_S
            spans.append((max(until, report["time"] - took), report["time"]))
            until, trained = max(until, report["time"]), report["seconds"]
        if trial.datetime_complete is not None and (record is None or not record.counts):
            end = trial.datetime_complete.timestamp()
            spans.append((max(until, end - took), end))
    return spans


def _length_of_union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def duration(seconds: float) -> str:
    if 0 < seconds < 0.95:
        return f"{seconds:.1g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def rate_text(per_hour: float) -> str:
    return f"{per_hour:,.0f}" if per_hour >= 100 else f"{per_hour:.3g}"


def gain_text(gain: Gain) -> str:
    """Write a gain as the decrease of the best JS and the time for it. A rate alone could exceed the JS itself."""
    if gain.bits == 0:
        return "nothing more is expected of further training"
    return f"{gain.bits:.2g} bits {gain_source(gain)}"


def gain_source(gain: Gain) -> str:
    """Write the training for which a gain is expected."""
    return f"expected of {duration(gain.seconds)} more training ({gain.per_hour:.2g} an hour)"


def value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
