from raytune_emotion.tuning.execution.gpu_sharing import gpu_types, heaviest_configurations
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
