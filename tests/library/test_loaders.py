import numpy as np
import pytest
import torch
from PIL import Image

from raytune_emotion import create_loaders
from raytune_emotion.config import AugmentConfig
from raytune_emotion.errors import UserError


def test_a_batch_is_of_images_and_probabilities(store):
    train, val = create_loaders(store.path, batch_size=10)
    assert (len(train), len(val)) == (9, 4)
    assert [len(images) for images, _ in train] == [10] * 9  # 96 rows: 6 fill no batch
    assert [len(images) for images, _ in val] == [10, 10, 10, 3]
    for loader in (train, val):
        for images, targets in loader:
            assert images.shape[1:] == (3, 32, 32)
            assert images.dtype == targets.dtype == torch.float32
            assert images.min() >= 0
            assert images.max() <= 1
            torch.testing.assert_close(targets.sum(-1), torch.ones(len(targets)), rtol=0, atol=1e-5)


def test_validation_yields_all_rows_in_order_as_they_are(store):
    _, val = create_loaders(store.path, batch_size=16)
    images, targets = (torch.cat(parts) for parts in zip(*val, strict=True))
    pixels = torch.from_numpy(store.val.gather(np.arange(len(store.val)))).permute(0, 3, 1, 2)
    assert torch.equal((images * 255).round().to(torch.uint8), pixels)
    assert torch.equal(targets, torch.from_numpy(np.array(store.val.prob_NK)))


def test_training_has_another_order_in_each_pass_and_the_same_for_a_seed(store):
    passes = [[targets for _, targets in train] for train in [create_loaders(store.path)[0]] for _ in range(2)]
    again = [targets for _, targets in create_loaders(store.path)[0]]
    other = [targets for _, targets in create_loaders(store.path, seed=1)[0]]
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))
    assert torch.equal(torch.cat(passes[0]), torch.cat(again))
    assert not torch.equal(torch.cat(passes[0]), torch.cat(other))


def test_a_folder_gives_what_its_store_gives(faces, store):
    loaders = [create_loaders(data, image_size=32) for data in (faces, str(faces), store.path)]
    assert {train.store.fingerprint for train, _ in loaders} == {store.fingerprint}


def test_a_training_set_smaller_than_a_batch_is_one_batch(store):
    train, _ = create_loaders(store.path, batch_size=500)
    assert [len(images) for images, _ in train] == [96]


def test_a_loader_that_is_left_early_can_be_used_again(store):
    train, _ = create_loaders(store.path)
    next(iter(train))
    assert len(list(train)) == 3


def test_a_table_has_its_own_classes(tmp_path):
    rows = []
    for number, split in enumerate(["train"] * 4 + ["val"] * 2):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{split},0.5,0.25,0.25\n")
    (tmp_path / "faces.csv").write_text("image,split,happy,sad,calm\n" + "".join(rows))
    train, _ = create_loaders(tmp_path / "faces.csv", batch_size=2, image_size=16)
    assert train.classes == ("happy", "sad", "calm")
    again, _ = create_loaders(train.store.path, batch_size=2)
    assert again.classes == train.classes


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        create_loaders(tmp_path / "nothing")
    with pytest.raises(UserError, match="batch_size: expected a positive integer, got 0"):
        create_loaders(tmp_path, batch_size=0)
    with pytest.raises(UserError, match=r"batch_size: expected a positive integer, got 2\.5"):
        create_loaders(tmp_path, batch_size=2.5)


def test_a_box_is_erased_to_the_mean_colour_as_in_a_search(store):
    config = AugmentConfig(erase=1.0, flip=0.0)
    train, _ = create_loaders(store.path, batch_size=16, augmentation=config)
    plain, _ = create_loaders(store.path, batch_size=16, augmentation=AugmentConfig(flip=0.0))
    for (images, _), (before, _) in zip(train, plain, strict=True):
        erased = (images - before).abs().amax(1, keepdim=True) > 1e-5
        assert erased.flatten(1).any(1).all()
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand_as(images)
        where = erased.expand_as(images)
        torch.testing.assert_close(images[where], mean[where])
        assert images.min() >= 0
        assert images.max() <= 1
