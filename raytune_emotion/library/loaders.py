"""Load batches of faces and their distributions, from a folder or a packed store."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raytune_emotion.config import AugmentConfig
from raytune_emotion.data.augment import Decisions, augment, decide
from raytune_emotion.data.loader import batches, epoch_order
from raytune_emotion.data.prepare import prepare
from raytune_emotion.data.store import Split, Store
from raytune_emotion.errors import UserError

#: Colour of erased boxes; timm's default.
_MEAN_COLOUR = (0.485, 0.456, 0.406)
_NO_OFFSET, _NO_SCALE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_CPU = torch.device("cpu")


class Loader:
    """Batches of a split, on the CPU: images [B, 3, H, W], RGB, float32 in [0, 1]; and probabilities [B, K], float32.

    A loader for training shuffles and augments as a function of the seed and the number of the pass. It leaves out the
    rows that do not fill a batch. A loader for validation yields all rows in their order.

    Args:
        store: store of the split.
        split: N rows.
        batch_size: rows of a batch; if a training split has fewer rows, all of them.
        augmentation: augmentation for training; None: the loader is for validation.
        seed: seed of order and augmentation.
    """

    def __init__(
        self, store: Store, split: Split, batch_size: int, *, augmentation: AugmentConfig | None, seed: int = 0
    ) -> None:
        self.store, self.split, self.augmentation, self.seed = store, split, augmentation, seed
        self.batch_size = batch_size if augmentation is None else min(batch_size, len(split))
        self._passes = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the K classes, in order."""
        return self.store.classes

    def __len__(self) -> int:
        """Count the batches of a pass."""
        whole = len(self.split) / self.batch_size
        return math.ceil(whole) if self.augmentation is None else math.floor(whole)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows_N = np.arange(len(self.split))
        if self.augmentation is not None:
            rows_N = epoch_order(len(self.split), self.seed, self._passes)
        rows = [rows_N[i * self.batch_size :][: self.batch_size] for i in range(len(self))]
        decisions: Iterator[Decisions] = iter([{}] * len(rows))
        if self.augmentation is not None and rows:
            side, number = self.store.image_size, self._passes
            decisions = decide(self.augmentation, rows, seed=self.seed, epoch=number, side=side, device=_CPU)
        self._passes += 1
        with contextlib.closing(batches(self.split, rows, _CPU)) as stream:
            for batch, decision in zip(stream, decisions, strict=True):
                if "erase_top" not in decision:
                    yield augment(batch, decision, mean=_NO_OFFSET, std=_NO_SCALE)
                    continue
                # `augment` erases to zero, so shift the mean colour to zero and back.
                x_BCHW, prob_BK = augment(batch, decision, mean=_MEAN_COLOUR, std=_NO_SCALE)
                yield x_BCHW.add_(torch.tensor(_MEAN_COLOUR)[:, None, None]).clamp_(0, 1), prob_BK


def create_loaders(
    data: str | Path,
    batch_size: int = 32,
    *,
    image_size: int | None = None,
    augmentation: AugmentConfig | None = None,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> tuple[Loader, Loader]:
    """Open the data for training and validation. A folder is packed on first use, into the cache.

    Args:
        data: a folder in the layout of AffectNetFused, a table of faces, or a packed store; on a disk or at a URI.
        batch_size: rows of a batch.
        image_size: side of the square images, px; None: the size of the store, or that of the folder's images, at most
            224.
        augmentation: augmentation of the training images; None: half of them are mirrored, as in the commands.
        seed: seed of order and augmentation.
        classes: names of the K values of an annotation, in order; None: those of the table or the store; for a folder,
            the 13 emotions.
        skip_bad: whether faulty rows of a folder are left out; otherwise they are an error.

    Returns:
        The loader for training and the one for validation. Both have the attribute `store`.

    Raises:
        UserError: a sentence for every error of the data.
    """
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise UserError(f"batch_size: expected a positive integer, got {batch_size!r}")
    store = prepare(data, image_size=image_size, classes=classes, skip_bad=skip_bad)
    augmentation = AugmentConfig() if augmentation is None else augmentation
    return (
        Loader(store, store.train, batch_size, augmentation=augmentation, seed=seed),
        Loader(store, store.val, batch_size, augmentation=None),
    )
