"""The configuration of one run: a frozen tree that refuses nonsense when it is built.

A setting is named by its dotted path (`optim.lr`) in files, in tables and on the command line; plain
dicts of such names are what crosses process boundaries.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs
from typing_extensions import Self

from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError

Value = str | int | float | bool | None | tuple[str, ...]
FlatConfig = Mapping[str, Any]

# Strict, so that "3" is no number and 1 no truth; an int is still taken where a float is asked for.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    image_size: int = Field(default=224, ge=16, le=1024, description="side of the square image, px")
    classes: tuple[str, ...] = Field(
        default=EMOTIONS, min_length=2, description="names, in the order of the annotations"
    )

    @model_validator(mode="after")
    def _each_class_once(self) -> Self:
        if twice := sorted({name for name in self.classes if self.classes.count(name) > 1}):
            raise ValueError(f"each of the classes may be named once, and {', '.join(twice)} is named again")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    backbone: str = Field(default="resnet18", min_length=1, description="a timm model name")
    pretrained: bool = Field(
        default=False, description="start from timm's weights, or from weights_dir's; true where weights_dir is named"
    )
    weights_dir: str | None = Field(
        default=None, description="folder with <backbone>.safetensors, for machines without a hub"
    )
    dropout: float = Field(default=0.3, ge=0, lt=1, description="probability, before the classifier")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="probability of skipping a residual block")
    freeze_epochs: float = Field(default=0.0, ge=0, description="epochs at the beginning in which only the head learns")

    @model_validator(mode="before")
    @classmethod
    def _take_weights_that_are_named(cls, given: ArgsKwargs) -> ArgsKwargs:
        settings = given.kwargs or {}
        return ArgsKwargs(given.args, {"pretrained": settings.get("weights_dir") is not None, **settings})


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LossConfig:
    """Weights of the mixture: not negative, and one in sum."""

    mse: float = Field(default=0.0, ge=0, le=1, description="mean squared error")
    l1: float = Field(default=0.0, ge=0, le=1, description="mean absolute error")
    kl: float = Field(default=0.0, ge=0, le=1, description="Kullback-Leibler divergence, nats")
    ce: float = Field(default=0.0, ge=0, le=1, description="cross-entropy, nats")
    js: float = Field(default=0.0, ge=0, le=1, description="Jensen-Shannon divergence, bits")

    @model_validator(mode="after")
    def _on_the_simplex(self) -> Self:
        total = sum(dataclasses.asdict(self).values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights of the mixture must sum to 1, and sum to {total:.6g}")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The losses that take part, with their weights."""
        return {name: w for name, w in dataclasses.asdict(self).items() if w > 0}

    @property
    def label(self) -> str:
        """A name for people and folders: `kl`, or `mse0.25-kl0.75`."""
        parts = self.weights
        return "-".join(parts if len(parts) == 1 else (f"{name}{w:.2g}" for name, w in parts.items()))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimConfig:
    name: Literal["adam", "adamw", "sgd"] = Field(default="adamw", description="optimizer")
    lr: float = Field(default=1e-3, gt=0, le=100, description="peak step size")
    weight_decay: float = Field(default=0.0, ge=0, description="1/step, times lr; decoupled in adamw")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd; beta1 of adam and adamw")
    schedule: Literal["constant", "cosine", "plateau"] = Field(default="plateau", description="of the step size")
    warmup_epochs: float = Field(default=0.0, ge=0, description="linear warm-up, epochs")
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the learning rate from each layer to the one below it"
    )
    plateau_patience: float = Field(default=3.0, ge=0, description="epochs without a better val JS before lr falls")
    plateau_factor: float = Field(default=0.5, gt=0, lt=1, description="what lr is multiplied by then")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    batch_size: int = Field(default=32, ge=1, description="rows an optimizer step, over all workers")
    accumulate: int = Field(default=1, ge=1, description="micro-batches that a worker's share of a batch is cut into")
    epochs: int = Field(default=30, ge=1, description="passes over the training set, at most")
    evals_per_epoch: int = Field(default=1, ge=1, description="validations, reports and checkpoints an epoch")
    patience: float = Field(default=0.0, ge=0, description="epochs without a better val JS before the end; 0: never")
    grad_clip: float = Field(default=0.0, ge=0, description="largest L2 norm of the gradient; 0: any")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="a step, of the average of the weights that is validated and kept; 0: none"
    )
    balance: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="power of the inverse frequency of its majority class by which a row weighs",
    )
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of the mean training distribution in each training target"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="of the forward and backward pass")
    compile: Literal["auto", "always", "never"] = Field(
        default="auto", description="torch.compile of the training step; auto: on a GPU, in runs long enough to gain"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of weights, order, dropout and augmentation")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AugmentConfig:
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a mirror image")
    crop_scale: float = Field(
        default=1.0, gt=0, le=1, description="least share of the area that a random crop keeps; 1: whole"
    )
    colour: float = Field(default=0.0, ge=0, le=1, description="strength of jitter in brightness, contrast, saturation")
    grey: float = Field(default=0.0, ge=0, le=1, description="probability of a greyscale image")
    erase: float = Field(default=0.0, ge=0, le=1, description="probability of an erased rectangle")
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup's Beta distribution; 0: none")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of cutmix's Beta distribution; 0: none")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """Everything that decides the numbers of one run, but for the data."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=lambda: LossConfig(kl=1.0))
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.train.accumulate > self.train.batch_size:
            raise ValueError(
                f"train.accumulate: at most train.batch_size ({self.train.batch_size}), got {self.train.accumulate}"
            )
        if self.optim.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs: less than train.epochs ({self.train.epochs}), got {self.optim.warmup_epochs}"
            )
        return self

    @classmethod
    def from_flat(cls, flat: FlatConfig) -> Self:
        """Build the tree from settings by dotted path; a loss that is not named weighs nothing.

        Raises:
            UserError: with a sentence for every setting that is unknown, of the wrong kind or out of range.
        """
        faults = [unknown_setting(key) for key in flat if key not in SETTINGS]
        sections: dict[str, Any] = {}
        for section in dataclasses.fields(cls):
            given = {
                name: tuple(value) if isinstance(value, list) else value
                for key, value in flat.items()
                for prefix, _, name in [key.partition(".")]
                if prefix == section.name and key in SETTINGS
            }
            try:
                if given:
                    sections[section.name] = section.type(**given)  # type: ignore[operator]
            except ValidationError as error:
                faults += [_sentence((section.name, *e["loc"]), e["msg"], e["input"]) for e in error.errors()]
        if faults:
            raise UserError(faults)
        try:
            return cls(**sections)
        except ValidationError as error:
            raise UserError([_sentence(e["loc"], e["msg"], e["input"]) for e in error.errors()]) from None

    def flat(self) -> dict[str, Any]:
        """The inverse of `from_flat`: every setting by its dotted path, as values that YAML and JSON hold."""
        return {
            f"{section}.{name}": list(value) if isinstance(value, tuple) else value
            for section, settings in dataclasses.asdict(self).items()
            for name, value in settings.items()
        }


#: Other words for settings that people bring along.
_SYNONYMS = {"learning_rate": "lr", "optimizer": "optim.name", "model": "model.backbone"}

#: Every setting's dotted path, with its field.
SETTINGS: dict[str, dataclasses.Field[Any]] = {
    f"{section.name}.{setting.name}": setting
    for section in dataclasses.fields(RunConfig)
    for setting in dataclasses.fields(section.type)  # type: ignore[arg-type]
}


def unknown_setting(key: str) -> str:
    """Return the sentence for a name that is no setting, with the setting that was probably meant."""
    return f"{key}: there is no such setting{did_you_mean(key, SETTINGS)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known name that is nearest to a word; "" if none is near.

    A dotted name is also known by its last part (`lr` means `optim.lr`), by the initials of that (`optim.wd` means
    `optim.weight_decay`), and by the words of `_SYNONYMS`.
    """
    known = list(known)
    asked = word.lower().replace("-", "_")
    section, _, last = asked.rpartition(".")
    last = _SYNONYMS.get(last, last)
    same = [name for name in known if last in (name, *_short_names(name))]
    same = [name for name in same if name.startswith(f"{section}.")] or same
    near = same or difflib.get_close_matches(asked, known, n=1)
    if not near:
        by_last = {name.rpartition(".")[2]: name for name in known}
        near = [by_last[found] for found in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _short_names(name: str) -> tuple[str, ...]:
    last = name.rpartition(".")[2]
    initials = "".join(part[0] for part in last.split("_") if part)
    return (last, initials) if "_" in last else (last,)


def _sentence(loc: tuple[int | str, ...], message: str, value: object) -> str:
    where = ".".join(str(part) for part in loc)
    message = message.removeprefix("Value error, ").replace("Input should", "should")
    got = f", got {value!r}" if isinstance(value, str | int | float | bool | None) else ""
    return f"{where}: {message}{got}" if where else f"{message}"
