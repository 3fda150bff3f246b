"""Write a run's events for TensorBoard: a scalar for every number of its reports, and its settings.

The settings and the best JS appear on the page HParams, which compares the runs of a folder.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter

from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.learn.torch_patches import write_hparams

_GROUPS = ("val", "train")


class EventWriter:
    """Append a run's events to a new file in a folder.

    Args:
        folder: folder of the run; its name is the run's name in TensorBoard.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of a run for the page HParams. Lists and settings without a value are left out."""
        plain = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
        write_hparams(self._writer, plain, OBJECTIVE)
        self._writer.flush()

    def write_report(self, report: Mapping[str, object], step: int) -> None:
        """Write every float of a report except the time, at a step, under the name of `tag_of`."""
        for name, value in report.items():
            if isinstance(value, float) and name != "time":
                self._writer.add_scalar(tag_of(name), value, step)
        self._writer.flush()

    def write_picture(self, tag: str, image_HWC: npt.NDArray[np.uint8], step: int) -> None:
        """Write a picture at a step."""
        self._writer.add_image(tag, image_HWC, step, dataformats="HWC")
        self._writer.flush()


def tag_of(name: str) -> str:
    """Return TensorBoard's name for a number of a report: `val_js` is `val/js`, in the group `val`."""
    group, _, metric = name.partition("_")
    return f"{group}/{metric}" if group in _GROUPS else name
