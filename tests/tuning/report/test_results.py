"""The results table, model by loss."""

import csv
import io

from raytune_emotion.tuning.report.results import results_of, write_results
from raytune_emotion.tuning.study.records import TrialRecord
from tests.support.reports import make_report


def trial(number, model, weights, js, status="complete"):
    settings = {"model.backbone": model, **{f"loss.{name}": weight for name, weight in weights.items()}}
    reports = (make_report(1, 0.5), make_report(2, js, val_mse=js / 10, val_tvd=js / 2, seconds=8.0))
    return TrialRecord(f"{number:04d}", status, settings, "", reports)


RECORDS = [
    trial(0, "resnet18", {"mse": 1.0, "kl": 0.0}, 0.30),
    trial(1, "resnet18", {"mse": 1.0, "kl": 0.0}, 0.28, "pruned"),
    trial(2, "resnet18", {"mse": 0.0, "kl": 1.0}, 0.25),
    trial(3, "efficientnet_b0", {"mse": 0.0, "kl": 1.0}, 0.35),
    trial(4, "efficientnet_b0", {"mse": 0.25, "kl": 0.75}, 0.27),
    trial(5, "efficientnet_b0", {"mse": 0.6, "kl": 0.4}, 0.31),
    trial(6, "efficientnet_b0", {"mse": 1.0, "kl": 0.0}, 0.01, "failed"),
]


def test_each_pair_of_model_and_loss_has_its_best_trial():
    found = results_of(RECORDS)
    assert [(r.model, r.loss, r.trials, r.trial_id, r.val_js) for r in found] == [
        ("resnet18", "kl", 1, "0002", 0.25),
        ("efficientnet_b0", "mixture", 2, "0004", 0.27),
        ("resnet18", "mse", 2, "0001", 0.28),
        ("efficientnet_b0", "kl", 1, "0003", 0.35),
    ]
    assert found[1].weights.split() == ["kl", "0.75", "mse", "0.25"]


def test_numbers_are_those_of_the_report_with_the_best_js():
    found = results_of(RECORDS)[0]
    assert (found.val_mse, found.val_kl, found.val_tvd) == (0.025, 0.5, 0.125)
    assert found.seconds_per_epoch == 4.0


def test_the_table_has_a_column_for_each_number():
    header, *rows = csv.reader(io.StringIO(write_results(results_of(RECORDS))))
    assert header[-5:] == ["val_mse", "val_kl", "val_tvd", "val_js", "seconds_per_epoch"]
    assert len(rows) == 4
    assert write_results([]).strip() == ",".join(header)
