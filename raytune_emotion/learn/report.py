"""Hold what one evaluation of a run reports, and name the number that a study minimises."""

from typing import Final, TypedDict

#: Key of a report, and column of the table: the lowest validation JS of the run so far, bits.
OBJECTIVE: Final = "best_val_js"


class Heard(TypedDict):
    """The part of a report that a trial's process sends to the driver of a study."""

    report: int  # 1, 2, ...
    epoch: float  # trained so far
    seconds: float  # of training and evaluation so far
    best_val_js: float  # bits, the lowest so far
    finished: bool  # no further report will follow
    params_millions: float
    images_per_second: float  # in training, over all workers


class _Planar(TypedDict, total=False):
    val_emd_va: float  # not with classes that have no place in the valence-arousal plane


class Report(Heard, _Planar):
    """All of a report, as it lies in a run's history. Each metric of `per_sample` is there, with `val_` before it."""

    time: float  # unix
    train_loss: float  # mean over the rows since the report before
    lr: float  # of the newest step
    best_report: int
    accumulate: int  # micro-batches a step, of each worker
    workers: int  # that trained together
    val_js: float
    val_kl: float
    val_ce: float
    val_tvd: float
    val_mse: float
    val_l1: float
    val_emd: float
    val_chebyshev: float
    val_clark: float
    val_canberra: float
    val_cosine: float
    val_intersection: float
    val_accuracy: float


#: The keys that the driver hears.
HEARD = tuple(Heard.__annotations__)
