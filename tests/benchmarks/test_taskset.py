"""The judge on tasks of others, from files to JSON: two small tasks that are made up."""

import json
import lzma

import numpy as np
import pytest
from optuna.samplers import GPSampler

from benchmarks import taskset
from benchmarks.judge import Verdict, simulate
from benchmarks.taskset import SETTINGS, read_task
from raytune_emotion.errors import UserError


def rows_of(seed, count=12, validations=6):
    """Configurations whose curves fall to a value that their learning rate determines; the last one diverges."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        settings = {name: float(draw.uniform(0.1, 0.9)) for name in SETTINGS}
        values = settings["learning_rate"] + np.exp(-np.arange(validations))
        rows.append({"hp": settings, "valid": {"loss": [*values] if i < count - 1 else [float("nan")] * validations}})
    return rows


@pytest.fixture
def tasks(tmp_path):
    with lzma.open(tmp_path / "first.json.xz", "wt") as file:
        json.dump(rows_of(0), file)
    (tmp_path / "second.json").write_text(json.dumps(rows_of(1)))
    return tmp_path


def test_a_task_is_read_with_its_regrets_and_a_diverged_configuration_is_the_worst(tasks):
    task = read_task(tasks / "first.json.xz", steps=24)
    values = np.array([row["valid"]["loss"] for row in rows_of(0)[:-1]])
    assert task.bounds == (values.min(), pytest.approx(np.median([*values[:, 0], values.max()])))
    assert np.allclose(task.value_NR[-1], values.max())
    assert (task.budget, task.seconds_NR.sum()) == (24, 12 * 6)


def test_the_judge_writes_what_it_has_found_as_strict_json(tasks, tmp_path, capsys):
    out = tmp_path / "out" / "found.json"
    out.parent.mkdir()
    names = ["default", "random", "random+asha"]
    options = ["--steps", "24", "--seeds", "2", "--processes", "1", "--policies", ",".join(names), "--json", str(out)]
    assert taskset.main([str(tasks), *options]) == 0
    found = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert found["recordings"] == ["first", "second"]
    assert [*found["policies"]] == names
    for policy in found["policies"].values():
        assert policy["runs"] == 4
        assert np.all(np.diff(policy["mean_regret"]) <= 1e-12), "the best value never rises"
        share = policy["share_to_random_end"]
        assert share is None or 0 < share <= 1
    assert sum(policy["mean_rank"][-1] for policy in found["policies"].values()) == pytest.approx(1 + 2 + 3)
    assert "2 tasks" in capsys.readouterr().out


def test_the_gaussian_process_of_optuna_is_judged_beyond_its_random_beginning(tmp_path, monkeypatch):
    (tmp_path / "task.json").write_text(json.dumps(rows_of(0, count=40, validations=3)))
    task = read_task(tmp_path / "task.json", steps=100)
    proposed, propose = [], GPSampler.sample_relative
    monkeypatch.setattr(GPSampler, "sample_relative", lambda *args: proposed.append(propose(*args)) or proposed[-1])
    found = simulate(task, "gp+asha", 1, 0)
    assert len(proposed) >= len(found.begun) > 10
    assert [*filter(None, proposed)], "all proposals were random"


def test_a_policy_that_never_reaches_the_end_of_random_search_has_no_share_and_equal_ones_share_their_rank():
    regret = np.array([[[[0.5] * 5]], [[[0.5] * 5]], [[[0.1] * 5]]])
    share = np.array([[[np.inf]], [[1.0]], [[0.2]]])
    told = Verdict(["default", "random", "other"], ["task"], regret, share, bounded=True).to_json()["policies"]
    assert [policy["share_to_random_end"] for policy in told.values()] == [None, 1.0, 0.2]
    assert [policy["mean_rank"][0] for policy in told.values()] == [2.5, 2.5, 1.0]


def test_a_file_that_is_no_task_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"other\.json: is no task of Taskset \(KeyError: 'hp'\); move it away"):
        read_task(tmp_path / "other.json", steps=10)
