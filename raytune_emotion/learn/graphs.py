"""Make models that map pixels to probabilities, and write them as one graph: ONNX, or torch.export (pt2).

The input `images` is [N, H, W, 3], uint8, RGB, for any N, upright and resized to the side of the model. The output
`probabilities` is [N, K], float32. Normalisation and softmax are parts of the graph.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from raytune_emotion.learn.origin import Colour

INPUT, OUTPUT = "images", "probabilities"
_CLASSES = "classes.json"  # in a pt2 file


class PixelsToProbabilities(nn.Module):
    """A model with the normalisation before it and the softmax after it."""

    def __init__(self, model: nn.Module, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.model = model
        self.scale_C: torch.Tensor
        self.shift_C: torch.Tensor
        self.register_buffer("scale_C", torch.tensor([1 / (255 * s) for s in std]))
        self.register_buffer("shift_C", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x_BHWC = images.to(torch.float32) * self.scale_C + self.shift_C
        prob_BK: torch.Tensor = self.model(x_BHWC.permute(0, 3, 1, 2)).softmax(-1)
        return prob_BK


class Ensemble(nn.Module):
    """The mean of the probabilities of several models."""

    def __init__(self, members: Sequence[PixelsToProbabilities]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def model(self) -> nn.Module:
        """Return the networks of the members as one module, with weights named `members.0.…`, `members.1.…`, ..."""
        return nn.ModuleDict({"members": nn.ModuleList([member.model for member in self.members])})  # type: ignore[misc]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(images) for member in self.members]).mean(0)


#: Model of an export. Its attribute `model` has the networks, whose weights are saved.
Predictor = PixelsToProbabilities | Ensemble


def write_graph(name: str, file: Path, model: nn.Module, image_size: int, classes: Sequence[str]) -> None:
    """Write a model as a graph. Errors of torch's tracing are passed on.

    Args:
        name: name of the format, onnx or pt2.
        file: file to write.
        model: model that maps pixels to probabilities, on the CPU.
        image_size: side of its images, px.
        classes: names of the probabilities, in order; they are kept in the file.
    """
    # Use two images: torch takes a batch size of one for a constant.
    images_NHWC = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    with _silence_tracing(), torch.no_grad():
        batch = {INPUT: {0: torch.export.Dim("batch")}}
        program = torch.export.export(model.eval(), (images_NHWC,), dynamic_shapes=batch)
        if name == "pt2":
            # Write to memory first: torch ends the process if it cannot write, as on a full disk (pytorch 156955).
            stream = io.BytesIO()
            torch.export.save(program, stream, extra_files={_CLASSES: json.dumps(list(classes))})
            file.write_bytes(stream.getbuffer())
            return
        onnx = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}},
            verbose=False,
        )
        assert onnx is not None
        onnx.model.metadata_props["classes"] = json.dumps(list(classes))
        onnx.save(file, external_data=False)


def predict_graph(name: str, file: Path, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Predict with a file of `write_graph`, [N, K]."""
    return _RUN[name](file, images_NHWC).astype(np.float64)


def _run_onnx(file: Path, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (prob_NK,) = session.run([OUTPUT], {INPUT: images_NHWC})
    return np.asarray(prob_NK)


def _run_pt2(file: Path, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with file.open("rb") as stream, torch.no_grad():
        model: Any = torch.export.load(stream).module()
        prob_NK: npt.NDArray[np.float32] = model(torch.from_numpy(images_NHWC)).numpy()
        return prob_NK


_RUN: dict[str, Callable[[Path, npt.NDArray[np.uint8]], npt.NDArray[np.float32]]] = {
    "onnx": _run_onnx,
    "pt2": _run_pt2,
}


@contextlib.contextmanager
def _silence_tracing() -> Iterator[None]:
    """Suppress the messages of torch and onnxscript about tracing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
