"""Hold the configuration of one run: a frozen tree that is validated when it is built.

Files, tables and the command line name a setting by its dotted path (`optim.lr`). Plain dicts of such names cross
process boundaries.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs
from typing_extensions import Self

from raytune_emotion.emotions import EMOTIONS, check_class_names
from raytune_emotion.errors import UserError, did_you_mean, show

Value = str | int | float | bool | None | tuple[str, ...]
FlatConfig = Mapping[str, Any]

#: Upper bounds of settings that have no natural bound. A larger number is taken for a typing error.
_MOST_EPOCHS = 1_000_000
_MOST_ROWS = 10_000_000
_MOST = 1_000

# Strict: "3" is not a number and 1 is not a boolean. An int is accepted as a float.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    image_size: int = Field(default=224, ge=16, le=1024, description="side of the square image, px")
    classes: tuple[str, ...] = Field(
        default=EMOTIONS, min_length=2, description="names, in the order of the annotations"
    )

    @model_validator(mode="after")
    def _each_class_has_a_name_of_its_own(self) -> Self:
        check_class_names(self.classes)
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    backbone: str = Field(
        default="resnet18", min_length=1, description="a timm model, `hf-hub:OWNER/NAME` or `local-dir:/FOLDER`"
    )
    pretrained: bool = Field(
        default=False, description="start from pretrained weights of timm or weights_dir; default true with weights_dir"
    )
    weights_dir: str | None = Field(
        default=None, description="folder with <backbone>.safetensors, for machines without access to the hub"
    )
    dropout: float = Field(default=0.3, ge=0, lt=1, description="dropout probability before the classifier")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="probability of skipping a residual block")
    freeze_epochs: float = Field(
        default=0.0, ge=0, le=_MOST_EPOCHS, description="first epochs, in which only the head is trained"
    )

    @model_validator(mode="before")
    @classmethod
    def _take_weights_that_are_named(cls, given: ArgsKwargs) -> ArgsKwargs:
        settings = given.kwargs or {}
        return ArgsKwargs(given.args, {"pretrained": settings.get("weights_dir") is not None, **settings})


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LossConfig:
    """Weights of the loss mixture: non-negative, with sum 1."""

    mse: float = Field(default=0.0, ge=0, le=1, description="mean squared error")
    l1: float = Field(default=0.0, ge=0, le=1, description="mean absolute error")
    kl: float = Field(default=0.0, ge=0, le=1, description="Kullback-Leibler divergence, nats")
    ce: float = Field(default=0.0, ge=0, le=1, description="cross-entropy, nats")
    js: float = Field(default=0.0, ge=0, le=1, description="Jensen-Shannon divergence, bits")

    @model_validator(mode="after")
    def _on_the_simplex(self) -> Self:
        total = sum(dataclasses.asdict(self).values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights of the mixture must sum to 1, but their sum is {total:.6g}")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Return the losses with a positive weight."""
        return {name: w for name, w in dataclasses.asdict(self).items() if w > 0}

    @property
    def label(self) -> str:
        """Return a name for people and folders: `kl`, or `mse0.25-kl0.75`."""
        parts = self.weights
        return "-".join(parts if len(parts) == 1 else (f"{name}{w:.2g}" for name, w in parts.items()))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimConfig:
    name: Literal["adam", "adamw", "sgd"] = Field(default="adamw", description="optimizer")
    lr: float = Field(default=1e-3, gt=0, le=100, description="peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, le=_MOST, description="weight decay, decoupled in adamw")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd; beta1 of adam and adamw")
    schedule: Literal["constant", "cosine", "plateau"] = Field(default="plateau", description="learning rate schedule")
    warmup_epochs: float = Field(default=0.0, ge=0, le=_MOST_EPOCHS, description="epochs of linear warm-up")
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the learning rate from each layer to the one below it"
    )
    plateau_patience: float = Field(
        default=3.0,
        ge=0,
        le=_MOST_EPOCHS,
        description="epochs without a better validation JS before the learning rate drops",
    )
    plateau_factor: float = Field(default=0.5, gt=0, lt=1, description="factor of that drop")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    batch_size: int = Field(default=32, ge=1, le=_MOST_ROWS, description="rows per optimizer step, over all workers")
    accumulate: int = Field(default=1, ge=1, le=_MOST_ROWS, description="gradient accumulation steps")
    epochs: int = Field(default=30, ge=1, le=_MOST_EPOCHS, description="maximum number of passes over the training set")
    evals_per_epoch: int = Field(
        default=1, ge=1, le=_MOST_ROWS, description="evaluations, reports and checkpoints per epoch"
    )
    patience: float = Field(
        default=0.0,
        ge=0,
        le=_MOST_EPOCHS,
        description="epochs without a better validation JS before training ends; 0: never",
    )
    grad_clip: float = Field(default=0.0, ge=0, le=1e6, description="maximum L2 norm of the gradient; 0: no clipping")
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay per step of the average of the weights, which is validated and kept; 0: no average",
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
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="precision of the forward and backward pass"
    )
    compile: Literal["auto", "always", "never"] = Field(
        default="auto", description="use torch.compile; auto: on a GPU, in runs that are long enough to gain"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of weights, order, dropout and augmentation")


#: Settings of each augmentation recipe. The configuration's own settings override them.
RECIPES: dict[str, dict[str, float]] = {
    "none": {"flip": 0.0},
    "light": {"flip": 0.5, "crop_scale": 0.8, "colour": 0.1, "erase": 0.1},
    "strong": {"flip": 0.5, "crop_scale": 0.5, "colour": 0.4, "grey": 0.1, "erase": 0.3, "mixup": 0.2},
    "random": {"flip": 0.5, "operations": 2},
}


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AugmentConfig:
    recipe: Literal["none", "light", "strong", "random"] | None = Field(
        default=None, description="defaults of the other augment settings: none, light, strong or random"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    crop_scale: float = Field(
        default=1.0, gt=0, le=1, description="minimum share of the area that a random crop keeps; 1: no crop"
    )
    colour: float = Field(
        default=0.0, ge=0, le=1, description="strength of the jitter of brightness, contrast and saturation"
    )
    grey: float = Field(default=0.0, ge=0, le=1, description="probability of conversion to greyscale")
    erase: float = Field(default=0.0, ge=0, le=1, description="probability that a random rectangle is erased")
    operations: int = Field(
        default=0, ge=0, le=11, description="operations of RandAugment that are chosen at random for each row"
    )
    magnitude: float = Field(default=0.3, ge=0, le=1, description="strength of the operations of RandAugment")
    mixup: float = Field(default=0.0, ge=0, le=_MOST, description="alpha of the Beta distribution of mixup; 0: off")
    cutmix: float = Field(default=0.0, ge=0, le=_MOST, description="alpha of the Beta distribution of cutmix; 0: off")

    @model_validator(mode="before")
    @classmethod
    def _expand_recipe(cls, given: ArgsKwargs) -> ArgsKwargs:
        settings = given.kwargs or {}
        recipe = settings.get("recipe")
        return ArgsKwargs(given.args, {**RECIPES.get(recipe if isinstance(recipe, str) else "", {}), **settings})


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """Everything except the data that determines the numbers of one run."""

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
        """Build the tree from settings by dotted path; a loss that is not named has weight 0.

        Raises:
            UserError: one sentence for each setting that is unknown, of the wrong type or out of range.
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

    def to_flat(self) -> dict[str, Any]:
        """Return every setting by its dotted path, as values of YAML and JSON: the inverse of `from_flat`."""
        return {
            f"{section}.{name}": list(value) if isinstance(value, tuple) else value
            for section, settings in dataclasses.asdict(self).items()
            for name, value in settings.items()
        }


#: Common synonyms of settings.
_SYNONYMS = {"learning_rate": "lr", "optimizer": "optim.name", "model": "model.backbone"}

#: The field of each setting, by dotted path.
SETTINGS: dict[str, dataclasses.Field[Any]] = {
    f"{section.name}.{setting.name}": setting
    for section in dataclasses.fields(RunConfig)
    for setting in dataclasses.fields(section.type)  # type: ignore[arg-type]
}


def unknown_setting(key: str) -> str:
    """Return the error for an unknown setting, with the setting that was probably meant."""
    return f"{key}: unknown setting{suggest_setting(key, SETTINGS)}"


def suggest_setting(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known name that is closest to a word; "" if none is close.

    A dotted name is also found by its last part (`lr` means `optim.lr`), by the initials of the last part (`optim.wd`
    means `optim.weight_decay`), and by the words of `_SYNONYMS`.
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
    return did_you_mean(near)


def _short_names(name: str) -> tuple[str, ...]:
    last = name.rpartition(".")[2]
    initials = "".join(part[0] for part in last.split("_") if part)
    return (last, initials) if "_" in last else (last,)


def _sentence(loc: tuple[int | str, ...], message: str, value: object) -> str:
    where = ".".join(str(part) for part in loc)
    message = message.removeprefix("Value error, ").replace("Input should", "should")
    got = f", got {show(value)}" if isinstance(value, str | int | float | bool | None) else ""
    return f"{where}: {message}{got}" if where else f"{message}"
