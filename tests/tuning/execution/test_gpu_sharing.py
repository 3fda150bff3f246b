from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from raytune_emotion.errors import Breakdown
from raytune_emotion.tuning.execution import gpu_sharing
from raytune_emotion.tuning.execution.gpu_sharing import fastest_share, gpu_types, heaviest_configurations
from tests.support.studies import spec_of

SPACE = {
    "model.backbone": {"choice": ["test_resnet", "test_vit"]},
    "data.image_size": {"choice": [32, 48]},
    "optim.lr": {"log_uniform": [1e-4, 1e-2]},
    "train.batch_size": {"choice": [16, 32, 128]},
    "train.precision": {"choice": ["bf16", "fp32"]},
    "when": [{"if": {"model.backbone": ["test_vit"]}, "train.batch_size": {"int_uniform": [8, 24]}}],
}


def test_each_backbone_is_tried_where_it_takes_the_most_memory(store):
    spec = spec_of(store, name="study", space=SPACE, trials=1, epochs=2)
    found = heaviest_configurations(spec)
    assert {*found} == {"test_resnet", "test_vit"}
    for settings in found.values():
        assert settings["data.image_size"] == 48
        assert settings["train.precision"] == "fp32"
        assert settings["train.epochs"] == 2
    assert found["test_resnet"]["train.batch_size"] == 128
    # Of a range, nearly the end.
    assert 22 <= found["test_vit"]["train.batch_size"] <= 24


def test_each_type_of_gpu_is_measured_once():
    small, large = ({"CPU": 8.0, "GPU": 2.0, f"accelerator_type:{name}": 1.0} for name in ("T4", "A100"))
    cores = {"CPU": 8.0, "accelerator_type:TPU-V4": 1.0}
    assert gpu_types([small, large, small, cores]) == ["A100", "T4"]
    assert gpu_types([{"CPU": 8.0, "GPU": 2.0}]) == [None]


class MeasuringRay:
    """Stand in for Ray on a cluster: a task returns what was measured on a GPU of its type, or fails."""

    def __init__(self, found):
        self._found = found
        self.reserved, self.tasks = {}, []  # what each task reserves; the type and the arguments of each

    def remote(self, **reserved):
        self.reserved = reserved
        return lambda function: self

    def options(self, accelerator_type):
        def remote(*args):
            self.tasks.append((accelerator_type, *args))
            return accelerator_type

        return SimpleNamespace(remote=remote)

    def get(self, accelerator_type):
        found = self._found[accelerator_type]
        if isinstance(found, Exception):
            raise found
        return found


def node_of(gpus, kind):
    return {"CPU": 1.0, "GPU": gpus, f"accelerator_type:{kind}": 1.0}


@pytest.fixture
def measured(monkeypatch):
    """Lets a cluster have GPUs of these types, three of the first, of which measurements have these results."""

    def let(**found):
        ray, (first, *others) = MeasuringRay(found), [*found]
        nodes = [node_of(2.0, first), node_of(1.0, first), *(node_of(1.0, kind) for kind in others)]
        monkeypatch.setattr(gpu_sharing, "ray", ray)
        monkeypatch.setattr(gpu_sharing, "cluster_nodes", lambda: nodes)
        monkeypatch.setattr(gpu_sharing, "iterate_watched", lambda reports, watch: reports)
        return ray

    return let


#: Images per second by the number of trials on one GPU. The first is fastest with four trials, the second with two, as
#: one of its backbones does not fit more often.
FAST = {"test_resnet": {1: 100.0, 2: 180.0, 4: 300.0, 8: 300.0}, "test_vit": {1: 50.0, 2: 90.0, 4: 150.0, 8: 150.0}}
SMALL = {"test_resnet": {1: 40.0, 2: 70.0, 4: 90.0}, "test_vit": {1: 20.0, 2: 35.0}}


@pytest.mark.parametrize(
    ("found", "share"), [({"A100": FAST}, 1 / 4), ({"A100": FAST, "T4": SMALL}, 1 / 2), ({"A100": {"x": {}}}, 1.0)]
)
def test_the_share_of_a_gpu_is_the_fastest_that_fits_each_type(store, measured, found, share):
    ray, said = measured(**found), []
    spec = spec_of(store, space=SPACE)
    assert fastest_share(spec, None, said.append) == share
    heaviest = heaviest_configurations(spec)
    assert ray.tasks == [(kind, heaviest, spec.stores, [1, 2, 4, 8]) for kind in found]
    assert ray.reserved == {"num_cpus": 0.5, "num_gpus": 1, "max_retries": 0}
    assert f"trials per GPU: {1 / share:g}; " in said[-1]


@pytest.mark.parametrize(("concurrency", "counts"), [(3, [1]), (4, [1, 2]), (7, [1, 2]), (100, [1, 2, 4, 8])])
def test_no_more_trials_are_tried_on_a_gpu_than_run_at_once(store, measured, concurrency, counts):
    ray = measured(A100=FAST)
    fastest_share(spec_of(store, space=SPACE, concurrency=concurrency), None, lambda text: None)
    assert [task[-1] for task in ray.tasks] == [counts]


def test_a_measurement_that_fails_ends_the_search_with_advice(store, measured):
    measured(A100=FAST, T4=RayTaskError("_measure_here", "", RuntimeError("no kernel image is available")))
    with pytest.raises(Breakdown, match="--gpus-per-worker auto: no kernel image is available; give a number instead"):
        fastest_share(spec_of(store, space=SPACE), None, lambda text: None)
