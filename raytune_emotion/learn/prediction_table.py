"""Write predictions batch by batch as CSV, JSON lines, Parquet, or a list for people."""

import csv
import json
from collections.abc import Callable, Sequence
from typing import BinaryIO, Protocol, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raytune_emotion.emotions import IMAGE
from raytune_emotion.terminal import escape

_DECIMALS = 6
_ROWS_OF_A_GROUP = 4096


class Table(Protocol):
    """A table of predictions that is being written."""

    def write(self, names: Sequence[str], prob_NK: npt.NDArray[np.float64]) -> None:
        """Write rows: the name of each image, and its probabilities."""

    def close(self) -> None:
        """Write the remaining rows and the end of the table."""


class CsvTable:
    """A header, then one line per image with its probabilities to six decimals. A terminal gets names escaped."""

    def __init__(self, text: TextIO, classes: Sequence[str]) -> None:
        self._text, self._lines = text, csv.writer(text, lineterminator="\n")
        self._lines.writerow([IMAGE, *classes])

    def write(self, names: Sequence[str], prob_NK: npt.NDArray[np.float64]) -> None:
        shown = map(escape, names) if self._text.isatty() else names
        for name, prob_K in zip(shown, prob_NK, strict=True):
            self._lines.writerow([name, *(f"{p:.{_DECIMALS}f}" for p in prob_K)])
        self._text.flush()

    def close(self) -> None:
        self._text.flush()


class JsonLines:
    """One line per image: its name, and its probabilities by class."""

    def __init__(self, text: TextIO, classes: Sequence[str]) -> None:
        self._text, self._classes = text, classes

    def write(self, names: Sequence[str], prob_NK: npt.NDArray[np.float64]) -> None:
        for name, prob_K in zip(names, prob_NK.round(_DECIMALS).tolist(), strict=True):
            row = {IMAGE: name, "probabilities": dict(zip(self._classes, prob_K, strict=True))}
            self._text.write(json.dumps(row) + "\n")
        self._text.flush()

    def close(self) -> None:
        self._text.flush()


class SortedList:
    """For people: the name of each image, then a line per class with its probability, the most probable first."""

    def __init__(self, text: TextIO, classes: Sequence[str]) -> None:
        self._text, self._classes = text, classes

    def write(self, names: Sequence[str], prob_NK: npt.NDArray[np.float64]) -> None:
        for name, prob_K in zip(names, prob_NK, strict=True):
            self._text.write(escape(name) + "\n")
            for k in np.argsort(-prob_K, kind="stable"):
                self._text.write(f"{100 * prob_K[k]:6.1f} %  {self._classes[k]}\n")
        self._text.flush()

    def close(self) -> None:
        self._text.flush()


class ParquetTable:
    """A column of names, and a column of float32 for each class."""

    def __init__(self, stream: BinaryIO, classes: Sequence[str]) -> None:
        self._schema = pa.schema([(IMAGE, pa.string()), *((name, pa.float32()) for name in classes)])
        self._stream = stream
        self._writer = pq.ParquetWriter(stream, self._schema)
        self._names: list[str] = []
        self._parts: list[npt.NDArray[np.float64]] = []

    def write(self, names: Sequence[str], prob_NK: npt.NDArray[np.float64]) -> None:
        self._names += names
        self._parts.append(prob_NK)
        if len(self._names) >= _ROWS_OF_A_GROUP:
            self._write_group()

    def close(self) -> None:
        if self._names:
            self._write_group()
        self._writer.close()
        self._stream.flush()

    def _write_group(self) -> None:
        prob_NK = np.concatenate(self._parts).astype(np.float32)
        columns = [pa.array(self._names, pa.string()), *(pa.array(column_N) for column_N in prob_NK.T)]
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._names, self._parts = [], []


#: Text formats by name. `parquet` is not one of them: it is written to a stream of bytes.
TEXT_TABLES: dict[str, Callable[[TextIO, Sequence[str]], Table]] = {
    "csv": CsvTable,
    "jsonl": JsonLines,
    "list": SortedList,
}
