"""What TensorBoard reads of a run, by its own reader and its own pages."""

import json
import math
import time
import urllib.request

import pytest
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raytune_emotion.learn.events import EventWriter

SETTINGS = {"model.backbone": "resnet18", "optim.lr": 1e-3, "train.seed": 0, "model.pretrained": False}


def write_run(folder, best_val_js, settings=SETTINGS):
    with EventWriter(folder) as events:
        events.write_settings(settings)
        for step, value in enumerate(best_val_js, start=1):
            report = {"report": step, "val_js": value, "train_loss": 1.0, "lr": 0.1 / step, "best_val_js": value}
            events.write_report({**report, "time": 1.7e9, "finished": False}, step)


def test_every_number_of_a_report_is_a_scalar(tmp_path):
    write_run(tmp_path, [0.5, 0.25])
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"val/js", "train/loss", "lr", "best_val_js"}
    assert [(event.step, event.value) for event in read.Scalars("val/js")] == [(1, 0.5), (2, 0.25)]
    assert [event.value for event in read.Scalars("lr")] == pytest.approx([0.1, 0.05])


@pytest.fixture
def ask(tmp_path):
    """Asks a real TensorBoard that shows a folder of two runs; it begins to read what is there when it starts."""
    write_run(tmp_path / "0000", [0.5, 0.25])
    write_run(tmp_path / "0001", [0.4], {**SETTINGS, "optim.name": "sgd", "data.classes": ["a", "b"], "gone": None})
    board = program.TensorBoard()
    board.configure(argv=["", "--logdir", str(tmp_path), "--port", "0", "--load_fast", "false"])
    url = board.launch()

    def asked(page, **request):
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}data/plugin/hparams/{page}", body, headers), timeout=60
        ) as answer:
            return json.load(answer)

    return asked


def test_the_page_hparams_holds_settings_and_best_js_of_every_trial(ask):
    names = (*SETTINGS, "optim.name")
    columns = [{"hparam": name} for name in names] + [{"metric": {"group": "", "tag": "best_val_js"}}]
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    asked = {"colParams": columns, "allowedStatuses": statuses, "startIndex": 0, "sliceSize": 9}
    settings, best = {}, {}
    while best.keys() != {"0000", "0001"} or best["0000"] != 0.25:  # until it has read both runs to their end
        time.sleep(0.1)
        for group in ask("session_groups", experimentName="", **asked)["sessionGroups"]:
            name = group["sessions"][0]["name"]
            settings[name] = group["hparams"]
            values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
            if "best_val_js" in values:
                best[name] = values["best_val_js"]
    experiment = ask("experiment", experimentName="")
    assert "best_val_js" in [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert {info["name"] for info in experiment["hparamInfos"]} == {*names}
    assert settings == {"0000": SETTINGS, "0001": {**SETTINGS, "optim.name": "sgd"}}
    assert math.isclose(best["0001"], 0.4, rel_tol=1e-6)
