"""Pause and resume trials: each stretch of training goes to the trial, new or paused, that promises most.

After Swersky et al., 2014, "Freeze-thaw Bayesian optimization". A trial trains in stretches, each as long as all
earlier ones together. After each stretch, the value of every trial at full length is forecast again. The next stretch
goes to the trial with the largest expected improvement per remaining report.

The best of thousands of new candidates is overestimated, because it is selected by its forecast. Therefore new trials
get at most a share of the training, and the rest goes to trials that have begun.

The first start points of the space train to their end without a pause, because the user has chosen them. Where trials
have few reports and few run at once, the first ones do so, too. There, a first stretch is a large part of a trial and
says little about its end, so a short study is better off with whole trials. With many workers, one trains further than
all others anyway, see below.

No forecast is possible for lengths that no trial has reached. Therefore the favourite, the paused trial with the best
forecast, is trained further than any trial before. This happens as soon as the new length is half of the training of
all trials together, or when no new trial may begin. Thus a study has a finished model early, and never ends without
one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np
from optuna.trial import FrozenTrial
from scipy.special import ndtr

from raytune_emotion.learn.report import DriverReport
from raytune_emotion.tuning.policy.candidates import Params, domain_of, draw_candidates
from raytune_emotion.tuning.policy.decisions import Answer, Begin, Decision, Limits, Prune, Recorded, TakeUp
from raytune_emotion.tuning.policy.gaussian_process import Kernel, on_one_thread
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.outlook import STD_FACTOR, Aim, Draw, Offer, Outlook
from raytune_emotion.tuning.policy.trial_attributes import (
    CONTINUES,
    RESUMED_IN,
    SECONDS,
    START,
    TAKEN_UP,
    as_paused,
    count_reports,
    has_whole_trial,
    is_paused,
    is_running,
    reports_left,
)

#: Smallest length of the first stretch, as a share of the full length and in reports: the first report says little.
_FIRST_SHARE, _FIRST_REPORTS = 0.03, 2
#: Smallest share of the full length that a stretch may leave. Otherwise it continues to the end.
_REST_SHARE = 0.3
#: Largest share of all training for first stretches while other trials could be resumed: the first value times the
#: number of stretches of a whole trial, but at least the second value. With more stretches, a first one is cheaper.
_NEW_SHARE, _LEAST_NEW_SHARE = 0.1, 0.4
#: The longest trial is continued once the training of all trials together is this multiple of its new length.
_LONGEST_IN = 2
#: Smallest probability of improving on the best for which a paused trial is kept once no new trial may begin.
_HOPE = 0.02
#: Number of first trials that train to their end without a pause if they are start points, or if no more than so many
#: run at once and the first stretch is at least this share of the full length.
_STRAIGHT, _LONG_LOOK = 2, 1 / 16
#: Number of running trials for each plan that is made with the same kernel and the same candidates. At least one is.
_RUNNING_PER_PLAN = 8
#: Assumed cost of resuming a trial, seconds, beside those that the study has measured; and largest share of the
#: training time that all resumptions may cost.
TAKE_UP_S, _TAKE_UP_SHARE = 0.4, 0.05


@dataclass(frozen=True)
class _Plan:
    """The plan that follows from the past. It holds until the next event."""

    prunes: tuple[int, ...]  # paused trials that are ended for good
    merits: Mapping[int, float]  # log merit of the paused trials that are worth resuming, by number
    favourite: int | None  # the paused trial with priority, which explores a length that no trial has reached
    #: Computes the trial to begin, None if the space has no other. If this is None, no new trial may begin.
    offer: Callable[[], Offer | None] | None
    merit: float  # log merit of the trial to begin

    def best(self, number: int | None = None) -> int | None:
        """Return the number of the trial to continue, among all paused ones or only this one.

        None if a new trial promises more.
        """
        among = [number] if number is not None else [*self.merits]
        if self.favourite in among:
            return self.favourite
        better = [each for each in among if each in self.merits and self.merits[each] > self.merit]
        return max(better, key=self.merits.__getitem__, default=None)


@dataclass
class _Kept:
    """The kernel and the candidates that serve several plans."""

    plans: int = 0  # number of plans that were made with them
    kernel: Kernel | None = None
    shortlist: Params | None = None  # the most promising candidates


class FreezeThaw:
    """Decide which trial trains next, and for how long.

    Its state is only a cache of what was computed: the plan, and, where many trials run at once, the kernel of the
    forecast and the best candidates. Those are kept for a few plans, because they take most of the time of a plan and
    change little by the few reports that arrive meanwhile. So with fewer than 16 trials at once, decisions depend on
    the past alone; with more, a resumed study may decide differently from one that was not interrupted.
    """

    def __init__(
        self,
        inputs: PolicyInputs,
        *,
        proposes: bool = True,
        take_up_s: float = TAKE_UP_S,
        draw: Draw = draw_candidates,
    ) -> None:
        """Make a policy.

        Args:
            inputs: inputs of the policy from the study.
            proposes: whether the most promising new configuration is begun; if not, the study's own sampler draws it.
            take_up_s: assumed cost of resuming a trial, seconds, beside those that the study has measured.
            draw: function that draws the candidates for a new trial.
        """
        self._domain, self._seed, self._earlier = domain_of(inputs.space), inputs.seed, inputs.earlier
        self._aim = Aim(inputs.objective, reports=inputs.reports)
        self._proposes, self._draw, self._take_up_s = proposes, draw, take_up_s
        self._reports, self._raised = inputs.reports, inputs.raised
        ends = stretch_ends(self._reports)
        self._ends = [end / self._reports * inputs.epochs for end in ends]
        self._first = ends[0] if ends else self._reports
        self._looks_are_long = self._first >= _LONG_LOOK * self._reports
        self._new_share = max(_NEW_SHARE * (len(ends) + 1), _LEAST_NEW_SHARE)
        self._plan: tuple[object, _Plan | None] = (None, None)
        self._kept = _Kept()

    def next(self, past: Sequence[FrozenTrial], limits: Limits) -> Answer:
        plan = self._plan_of(past, limits)
        paused = {trial.number for trial in past if is_paused(trial)}
        for number in plan.prunes:
            if number in paused:
                return Prune(number)
        best = plan.best() if plan.offer is None or self._can_afford(past) else None
        if best is not None:
            return TakeUp(best)
        if plan.offer is None:
            return None
        with on_one_thread():
            offer = plan.offer()
        if offer is None:  # all configurations of the space were tried
            self._remember(past, dataclasses.replace(limits, new=False), _state(past, limits))
            return self.next(past, limits)
        return Begin(offer.params if self._proposes else {})

    def decide(self, trial_id: str, report: DriverReport, past: Sequence[FrozenTrial], limits: Limits) -> Decision:
        """Answer for a report: at the end of a stretch, a trial pauses unless it would be resumed at once."""
        if not self._ends_stretch(report):
            return "go on"
        number = int(trial_id)
        if number < _STRAIGHT and (self._runs_whole_trials(past) or _is_start(past, number)):
            return "go on"
        past = [as_paused(trial, report["seconds"]) if trial.number == number else trial for trial in past]
        plan = self._plan_of(past, limits)
        if number in plan.prunes:
            return "stop"
        # This trial continues at no cost, but another one would have to be resumed.
        among = None if self._can_afford(past) else number
        return "go on" if plan.best(among) == number else "pause"

    def _runs_whole_trials(self, past: Sequence[FrozenTrial]) -> bool:
        """Tell whether the first trials train to their end, start points or not."""
        return self._looks_are_long and sum(map(is_running, past)) <= _STRAIGHT

    def _plan_of(self, past: Sequence[FrozenTrial], limits: Limits) -> _Plan:
        """Return the plan; make it again only if the past has changed."""
        known, plan = self._plan
        state = _state(past, limits)
        return plan if plan is not None and known == state else self._remember(past, limits, state)

    def _remember(self, past: Sequence[FrozenTrial], limits: Limits, state: object) -> _Plan:
        """Make a plan for these limits, and keep it for this state of the past."""
        with on_one_thread():
            plan = self._make_plan(past, limits)
        self._plan = state, plan
        return plan

    def decide_again(
        self, trial_id: str, report: DriverReport, past: Sequence[FrozenTrial], limits: Limits
    ) -> Decision:
        """Answer as for a new report: a trial that has just been resumed is still the most promising one."""
        return self.decide(trial_id, report, past, limits)

    def replay(self, trials: Sequence[Recorded]) -> None:
        """Learn nothing, because decisions depend only on the study's record."""

    def _ends_stretch(self, report: DriverReport) -> bool:
        """Tell whether a stretch ends between the previous report and this one, in epochs."""
        epoch = report["epoch"]
        before = epoch - epoch / report["report"]
        return any(before + 1e-9 < end <= epoch + 1e-9 for end in self._ends)

    def _make_plan(self, past: Sequence[FrozenTrial], limits: Limits) -> _Plan:
        # The trial for which the plan is made does not count as running.
        if self._kept.plans >= (1 + sum(map(is_running, past))) // _RUNNING_PER_PLAN:
            self._kept = _Kept()
        kept = self._kept
        kept.plans += 1
        outlook = Outlook(self._domain, past, self._aim, self._earlier, kept.kernel)
        kept.kernel = outlook.forecast.kernel if outlook.forecast is not None else None
        paused = [trial for trial in past if is_paused(trial)]
        # The seed depends on the number of trials, so that candidates stay the same until a trial begins.
        rng = np.random.default_rng([self._seed, len(past)])
        # It is computed at most once, and only if needed, because it takes half of the time of a decision.
        offer = functools.cache(lambda: self._make_offer(outlook, rng, kept)) if limits.new else None
        if outlook.forecast is None:
            # Too little is known for a forecast: new trials come first, then paused ones in their order.
            first = {trial.number: -float(trial.number) for trial in paused}
            return _Plan((), first, None, offer, -math.inf if offer is None else math.inf)
        merit = -math.inf
        had = [count_reports(trial) for trial in past]
        if offer is not None and not self._has_begun_enough(had):
            if (offered := offer()) is None:
                return self._make_plan(past, dataclasses.replace(limits, new=False))
            merit = offered.merit - math.log(self._reports)
        merits = self._merits(outlook, paused)
        favourite = self._favourite(outlook, paused) if self._owes_length(past, had, new=offer is not None) else None
        ranked = sorted(merits, key=lambda number: (number == favourite, merits[number]), reverse=True)
        resumable = {*ranked[: limits.paused]}
        if offer is None:
            resumable &= {favourite, *self._list_contenders(outlook, paused)}
        worth = {number: value for number, value in merits.items() if number in resumable}
        return _Plan(tuple(ranked[limits.paused :]), worth, favourite, offer, merit)

    def _make_offer(self, outlook: Outlook, rng: np.random.Generator, kept: _Kept) -> Offer | None:
        """Return the trial to begin: the best of the kept candidates, or, if all were tried, of new ones.

        If another sampler draws it, its merit is that of an average configuration.
        """
        if not self._proposes:
            offer = outlook.offer(self._draw(self._domain.parameters, (), rng))
            return offer and dataclasses.replace(offer, merit=offer.average)
        offer = outlook.offer(kept.shortlist, or_other=False) if kept.shortlist is not None else None
        if offer is None:
            offer = outlook.offer(outlook.candidates(rng, self._draw))
            # Without a forecast, candidates have no order.
            kept.shortlist = offer.shortlist if offer is not None and outlook.forecast is not None else None
        return offer

    def _has_begun_enough(self, had: Sequence[int]) -> bool:
        """Tell whether first stretches have used up their share of the training, given the reports of all trials."""
        return sum(min(reports, self._first) for reports in had) > self._new_share * sum(had)

    def _owes_length(self, past: Sequence[FrozenTrial], had: Sequence[int], *, new: bool) -> bool:
        """Tell whether a trial should now be trained further than any trial before."""
        ends = (*stretch_ends(self._reports), self._reports)
        longer = next((end for end in ends if end > max(had, default=0)), None)
        if longer is None or has_whole_trial(past, self._reports, self._raised):
            return False
        # Without this check, every worker would train its first trial to the end.
        on_its_way = any(
            is_running(trial) and next((end for end in ends if end > length), longer) == longer
            for trial, length in zip(past, had, strict=True)
        )
        return not on_its_way and (not new or sum(had) >= _LONGEST_IN * longer)

    def _favourite(self, outlook: Outlook, paused: Sequence[FrozenTrial]) -> int | None:
        """Return the number of the paused trial with the best forecast; None if there is none."""
        if not paused or outlook.forecast is None:
            return None
        mean_M, _ = outlook.forecast([self._domain.settings(trial) for trial in paused])
        return paused[int(mean_M.argmin())].number

    def _merits(self, outlook: Outlook, paused: Sequence[FrozenTrial]) -> dict[int, float]:
        """Return the log merit of paused trials by number: the expected improvement per remaining report."""
        if not paused:
            return {}
        settings = [self._domain.settings(trial) for trial in paused]
        left_M = np.array([reports_left(trial, self._reports) for trial in paused])
        merit_M = outlook.log_promise(settings) - np.log(left_M)
        return {trial.number: float(merit) for trial, merit in zip(paused, merit_M, strict=True)}

    def _list_contenders(self, outlook: Outlook, paused: Sequence[FrozenTrial]) -> set[int]:
        """Return the numbers of the paused trials that may still improve on the best."""
        if not paused or self._aim.objective.front:
            # Every trial may improve its part of a front.
            return {trial.number for trial in paused}
        assert outlook.forecast is not None
        mean_M, std_M = outlook.forecast([self._domain.settings(trial) for trial in paused])
        hope_M = ndtr((outlook.forecast.best - mean_M) / (STD_FACTOR * std_M))
        return {trial.number for trial, hope in zip(paused, hope_M, strict=True) if hope >= _HOPE}

    def _can_afford(self, past: Sequence[FrozenTrial]) -> bool:
        """Tell whether one more trial can be resumed with the cost of all resumptions in their share of the time."""
        attributes = [trial.user_attrs for trial in past]
        # The seconds of a trial contain those of the trial that it continues.
        continued = {int(each[CONTINUES]) for each in attributes if each.get(SECONDS) and each.get(CONTINUES)}
        trained_s = sum(float(trial.user_attrs.get(SECONDS, 0.0)) for trial in past if trial.number not in continued)
        taken_up = sum(int(each.get(TAKEN_UP, 0)) for each in attributes)
        measured = [float(each[RESUMED_IN]) for each in attributes if RESUMED_IN in each]
        # A median, because a place may have been free for other reasons.
        cost_s = median_low([self._take_up_s, *measured])
        return (taken_up + 1) * cost_s <= _TAKE_UP_SHARE * trained_s


def _is_start(past: Sequence[FrozenTrial], number: int) -> bool:
    return any(trial.number == number and trial.user_attrs.get(START) for trial in past)


def _state(past: Sequence[FrozenTrial], limits: Limits) -> object:
    """Return the part of the past on which a plan depends."""
    # Paused and failed trials do not run; they differ in their state.
    return limits, [(trial.number, trial.state, is_running(trial), len(trial.intermediate_values)) for trial in past]


def stretch_ends(reports: int) -> list[int]:
    """Return the reports at which the stretches of a trial end, except the last stretch."""
    end = max(_FIRST_REPORTS, math.ceil(_FIRST_SHARE * reports))
    ends = []
    while end <= (1 - _REST_SHARE) * reports:
        ends.append(end)
        end *= 2
    return ends
