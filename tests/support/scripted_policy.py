"""A policy that answers what a test says."""


class ScriptedPolicy:
    """Stand in for a policy: it answers from a script after a report, and for a free place."""

    def __init__(self):
        self.decisions = {}  # by trial and report; every other report: go on
        self.answers = []  # for free places, in order
        self.pasts, self.limits = [], []  # what it was asked with: user attributes of the trials, and limits

    def decide(self, trial_id, report, past, limits):
        return self.decisions.get((trial_id, report["report"]), "go on")

    def decide_again(self, *about):
        return self.decide(*about)

    def replay(self, trials):
        pass

    def next(self, past, limits):
        self.pasts.append([dict(trial.user_attrs) for trial in past])
        self.limits.append(limits)
        return self.answers.pop(0)
