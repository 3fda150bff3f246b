"""Show a search space and the cost of its trials, before any trial runs."""

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from rich.console import Console

from raytune_emotion.config import RunConfig
from raytune_emotion.data.prepare import Data
from raytune_emotion.learn import losses
from raytune_emotion.learn.device import find_device
from raytune_emotion.learn.model import build_model, to_device
from raytune_emotion.learn.optim import build_optimizer
from raytune_emotion.terminal import count, plain_table
from raytune_emotion.tuning.execution.placement import Demand, Placement, fit_here
from raytune_emotion.tuning.space.space import Space, draw
from raytune_emotion.tuning.study.creation import check_trainable, image_sizes
from raytune_emotion.tuning.study.earlier import WarmStart
from raytune_emotion.tuning.study.request import DEFAULT_TRIALS, SearchRequest

#: Number of configurations to show.
_DRAWN = 10
#: Batch size of the measurement.
_ROWS = 32
#: Number of measured steps.
_STEPS = 5


@dataclass(frozen=True)
class Cost:
    """The cost of training one backbone at one image size."""

    backbone: str
    image_size: int  # px
    params_millions: float
    images_per_second: float  # in training, without augmentation and evaluation


def show_dry_run(console: Console, request: SearchRequest, space: Space, data: Data, warm_start: WarmStart) -> None:
    """Show the space of a study, and the cost of its trials, each with its own share of the cores.

    Raises:
        UserError: not even one trial fits this machine, or its settings do not fit the data.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows, sizes = data.count_rows(), image_sizes(data, space)
    check_trainable(space, data, workers=request.workers_per_trial or 1)
    device = find_device(request.gpus_per_worker)
    place = _place_on_cores(request, device)

    settings = plain_table("setting", "values", title="search space")
    for key, value in space.to_dict().items():
        if key == "when":
            for branch in value:
                settings.add_row(key, _branch(branch))
        elif key != "start":
            settings.add_row(key, in_words(value))
    console.print(settings)
    console.print("ten configurations\n")
    for configuration in draw(space, _DRAWN, space.fixed_settings.get("train.seed", 0)):
        named = ((key.rpartition(".")[2], configuration[key]) for key in space.columns() if key in configuration)
        console.print("  ".join(f"{name} {_short(value)}" for name, value in named))
    guide = f"the search is guided by {warm_start.description}\n" if warm_start.description else ""
    console.print(f"\n{guide}")
    epochs, trials = space.fixed_settings["train.epochs"], request.trials or DEFAULT_TRIALS
    headings = ("backbone", "px", "parameters, millions", "images/s", "time per trial")
    threads = _threads_of(place)
    used = f"{device}, {count(threads, 'thread')}" if place else device
    cost = plain_table(*headings, title=f"training on this machine ({used})")
    share = min(1.0, place.resources.cpus_per_worker) if place else 1.0  # of a core, where trials share one
    seconds = []
    for each in costs(space, sizes, device, threads):
        seconds.append(rows * epochs / each.images_per_second / share)
        rate = f"{each.images_per_second:.0f}"
        cost.add_row(each.backbone, str(each.image_size), f"{each.params_millions:.2f}", rate, _duration(seconds[-1]))
    console.print(cost)
    at_once = min(trials, place.concurrency) if place else 1
    whole = _duration(trials / at_once * statistics.fmean(seconds))
    console.print(
        f"{count(trials, 'trial')} of {count(epochs, 'epoch')} on {count(rows, 'image')}"
        f"{f', {place}' if place else ''}: {whole} on this device if "
        f"none is stopped and all backbones are equally frequent; measured in a few steps, beside other programs"
    )


def _place_on_cores(request: SearchRequest, device: torch.device) -> Placement | None:
    """Fit the trials of a study to the cores of this machine; return None on a GPU, or if a cluster will train them."""
    if device.type != "cpu" or request.address is not None:
        return None
    return fit_here(Demand(request.workers_per_trial or 1, 0.0, request.concurrency))


def _threads_of(place: Placement | None) -> int:
    """Return the threads of a trial; without a placement, those of this process."""
    return place.resources.workers * place.resources.threads if place else torch.get_num_threads()


def in_words(value: Any) -> str:
    """Describe a value or a distribution of a space, in the words of docs/search-space.md."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    ((kind, given),) = value.items()
    if kind in ("choice", "simplex"):
        names = ", ".join(map(in_words, given))
        return f"one of {names}" if kind == "choice" else f"weights with sum 1 of {names}"
    number = "integer" if kind.startswith("int_") else "real number"
    scale = ", uniform in its logarithm" if kind.endswith("log_uniform") else ""
    step = f", step {given[2]:g}" if len(given) > 2 else ""
    return f"{number} from {given[0]:g} to {given[1]:g}{scale}{step}"


def _branch(branch: Mapping[str, Any]) -> str:
    """Describe settings that apply only for some choices."""
    given = {name: value if isinstance(value, list | tuple) else [value] for name, value in branch["if"].items()}
    conditions = [f"{name} is {' or '.join(map(str, values))}" for name, values in given.items()]
    settings = [f"{name}: {in_words(value)}" for name, value in branch.items() if name != "if"]
    return f"{' and '.join(conditions)}: {'; '.join(settings)}"


def _duration(seconds: float) -> str:
    """Write a time in hours, minutes or seconds."""
    size, unit = next((each for each in ((3600, "h"), (60, "min")) if seconds >= each[0]), (1, "s"))
    return f"{seconds / size:.1f} {unit}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def costs(space: Space, sizes: tuple[int, ...], device: torch.device, threads: int) -> list[Cost]:
    """Time some training steps of each backbone of a space on noise, with a number of threads."""
    backbones = space.values_of("model.backbone") or (RunConfig().model.backbone,)
    weights_dir = space.fixed_settings.get("model.weights_dir")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_cost(name, size, weights_dir, device) for name in backbones for size in sizes]
    finally:
        torch.set_num_threads(before)


def _cost(backbone: str, size: int, weights_dir: str | None, device: torch.device) -> Cost:
    # The configuration of a backbone of the hub may exist only in the folder of weights.
    settings = {"model.backbone": backbone, "data.image_size": size, "model.weights_dir": weights_dir}
    config = RunConfig.from_flat(settings)
    model = to_device(build_model(config, weights=False), device)
    optimizer = build_optimizer(model, config.optim)
    loss = losses.mixture(config.loss.weights)
    x_BCHW = torch.randn(_ROWS, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    prob_BK = torch.rand(_ROWS, len(config.data.classes), device=device).softmax(dim=1)

    def step() -> None:
        loss(model(x_BCHW), prob_BK).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()  # the first step chooses kernels and allocates memory
    seconds = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return Cost(backbone, size, millions, _ROWS / statistics.median(seconds))
