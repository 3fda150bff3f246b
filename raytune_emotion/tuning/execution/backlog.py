"""Keep the trials of a study that are still to run: those that wait for a process, and how many may begin."""

import time
from collections import deque
from collections.abc import Callable, Collection

from raytune_emotion.learn.run_folder import BEST, LAST
from raytune_emotion.tuning.policy.decisions import Limits
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import Proposal, StudyTrial, list_trials
from raytune_emotion.tuning.study.trials import trial_file

#: Largest number of paused trials, and of bytes of their checkpoints.
PAUSED_TRIALS, PAUSED_BYTES = 32, 16 * 2**30

#: Seconds between two questions of an idle driver whether other drivers have abandoned trials.
_ASK_AGAIN_S = 2.0


class Backlog:
    """Keep the trials of a study that are still to run."""

    def __init__(self, study: OpenStudy, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with an empty backlog."""
        self._study, self._clock = study, clock
        self._running: dict[str, Proposal] = {}  # by this driver
        self._queue: deque[str] = deque()  # trials that ran, and go on in this driver
        self._begun = 0  # trials that were ever asked for
        self._elsewhere = 0  # trials that other drivers run
        self._paused: dict[str, int] = {}  # bytes of their checkpoints
        self._idle = False  # the policy had nothing to run, and nothing has happened here since
        self._ask_again = clock()

    def look(self, ended: Collection[str]) -> tuple[list[StudyTrial], list[StudyTrial]]:
        """Read all trials again. No other driver may begin or resume one meanwhile.

        Args:
            ended: trials that are known to have ended.

        Returns:
            Other trials that have ended, and those that nobody runs any more.
        """
        trials = list_trials(self._study.optuna)
        known = {*self._running, *self._queue, *ended}
        others = [trial for trial in trials if trial.trial_id not in known and trial.status != "paused"]
        running = [trial for trial in others if trial.status == "running"]
        gone = self._study.drivers.abandoned({trial.driver for trial in running})
        abandoned = [trial for trial in running if trial.driver in gone]
        self._begun, self._elsewhere = len(trials), len(running) - len(abandoned)
        paused = [trial.trial_id for trial in trials if trial.status == "paused"]
        self._paused = {trial_id: self._paused.get(trial_id) or self._size(trial_id) for trial_id in paused}
        return [trial for trial in others if trial.status != "running"], abandoned

    def _size(self, trial_id: str) -> int:
        sizes = self._study.copy.location.sizes(trial_file(trial_id, name) for name in (LAST, BEST))
        return sum(size or 0 for size in sizes)

    @property
    def is_over(self) -> bool:
        """Tell whether no trial runs or can run here, and no other driver runs a trial."""
        return self._rests and not self._elsewhere

    @property
    def waits(self) -> bool:
        """Tell whether no trial runs or can run here, but other drivers run trials."""
        return self._rests and self._elsewhere > 0

    @property
    def _rests(self) -> bool:
        return not self._running and not self._queue and self._idle

    @property
    def has_queue(self) -> bool:
        """Tell whether an interrupted trial waits to continue in this driver."""
        return bool(self._queue)

    @property
    def may_ask(self) -> bool:
        """Tell whether there may be something to run."""
        return self.has_queue or not self._idle or (self._elsewhere > 0 and self._clock() >= self._ask_again)

    @property
    def limits(self) -> Limits:
        """Return the present limits of the study."""
        largest = max(self._paused.values(), default=0)
        most = min(PAUSED_TRIALS, max(1, PAUSED_BYTES // largest)) if largest else PAUSED_TRIALS
        return Limits(new=self._begun < self._study.spec.trials, paused=most)

    def count_open(self) -> int:
        """Return the number of trials that have not ended, and could run here if there were room for all."""
        begun = len(self._running) + len(self._queue) + len(self._paused)
        return begun + max(0, self._study.spec.trials - self._begun)

    def requeue(self, trial_id: str) -> None:
        """Queue an abandoned trial, so that it continues in this driver after those that wait already."""
        self._queue.append(trial_id)

    def give_back(self, trial_id: str) -> None:
        """Queue a running trial first, so that it continues in another process of this driver."""
        del self._running[trial_id]
        self._queue.appendleft(trial_id)

    def take(self) -> str | None:
        """Return the first trial of the queue, and remove it; None if the queue is empty."""
        return self._queue.popleft() if self._queue else None

    def note_answer(self, answer: Proposal | None) -> None:
        """Note the answer of the policy; None if it has nothing to run now."""
        if answer is None:
            self._idle, self._ask_again = True, self._clock() + _ASK_AGAIN_S
            return
        self._begun = max(self._begun, int(answer.trial_id) + 1)
        self._paused.pop(answer.trial_id, None)

    def start(self, proposal: Proposal) -> None:
        """Note that a trial runs here."""
        self._running[proposal.trial_id] = proposal

    def proposal_of(self, trial_id: str) -> Proposal:
        """Return the proposal of a trial that runs here."""
        return self._running[trial_id]

    def wake(self) -> None:
        """Note an event here, after which the policy may have a trial to run."""
        self._idle = False

    def pause(self, trial_id: str) -> None:
        """Note that a trial was paused."""
        self.wake()
        self._running.pop(trial_id, None)
        self._paused[trial_id] = self._size(trial_id)

    def end(self, trial_id: str) -> None:
        """Note that a trial has ended."""
        self.wake()
        self._running.pop(trial_id, None)
        self._paused.pop(trial_id, None)

    def paused(self) -> list[str]:
        """Return the paused trials, if no other driver could resume them."""
        return [] if self._elsewhere else [*self._paused]
