"""Define the report of one evaluation of a run, and name the number that a study minimises."""

from typing import Final, NotRequired, TypedDict

#: Key of a report, and column of the table: the lowest validation JS of the run so far, bits.
OBJECTIVE: Final = "best_val_js"


class DriverReport(TypedDict):
    """The part of a report that a trial's process sends to the driver of a study."""

    report: int  # 1, 2, ...
    epoch: float  # trained so far
    seconds: float  # of training and evaluation so far
    best_val_js: float  # bits, the lowest so far
    finished: bool  # no further report will follow
    params_millions: float
    images_per_second: float  # in training, over all workers
    #: Seconds for which nothing was trained before the trial was resumed. Only in the first report after that, and not
    #: in a history.
    resumed_in: NotRequired[float]


class _Planar(TypedDict, total=False):
    val_emd_va: float  # missing if a class has no position in the valence-arousal plane


class Report(DriverReport, _Planar):
    """A whole report, as in a run's history. It has each metric of `per_sample` with the prefix `val_`."""

    time: float  # unix
    train_loss: float  # mean over the rows since the previous report
    lr: float  # of the newest step
    best_report: int  # number of the report with the lowest val_js
    accumulate: int  # micro-batches of each worker per step
    workers: int  # number of workers
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


#: Keys of the part of a report that is sent to the driver.
DRIVER_KEYS = tuple(name for name in DriverReport.__annotations__ if name in DriverReport.__required_keys__)
