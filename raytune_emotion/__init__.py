"""Search for the model that best predicts a distribution over emotions from a face.

The library: `from raytune_emotion import create_model, create_loaders, create_trainer, search, load_study, …`. Each
name is imported at its first use, so that `import raytune_emotion` is fast.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from raytune_emotion.interruption import end_quietly, is_command

# This comes before all other imports: they take seconds, in which the user may type Ctrl-C.
if is_command(sys.orig_argv):
    end_quietly()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from raytune_emotion.errors import UserError as UserError
    from raytune_emotion.library.loaders import create_loaders as create_loaders
    from raytune_emotion.library.losses import CombinedLoss as CombinedLoss
    from raytune_emotion.library.losses import CrossEntropyLoss as CrossEntropyLoss
    from raytune_emotion.library.losses import JSLoss as JSLoss
    from raytune_emotion.library.losses import KLDivLoss as KLDivLoss
    from raytune_emotion.library.losses import L1Loss as L1Loss
    from raytune_emotion.library.losses import MSELoss as MSELoss
    from raytune_emotion.library.losses import get_loss_function as get_loss_function
    from raytune_emotion.library.metrics import MetricsCalculator as MetricsCalculator
    from raytune_emotion.library.models import create_model as create_model
    from raytune_emotion.library.pictures import plot_training_curves as plot_training_curves
    from raytune_emotion.library.pictures import visualize_predictions as visualize_predictions
    from raytune_emotion.library.studies import load_study as load_study
    from raytune_emotion.library.trainer import create_trainer as create_trainer
    from raytune_emotion.library.trainer import load_checkpoint as load_checkpoint

#: Module that defines each name of the library.
_MODULES = {
    "UserError": "errors",
    "create_loaders": "library.loaders",
    "CombinedLoss": "library.losses",
    "CrossEntropyLoss": "library.losses",
    "JSLoss": "library.losses",
    "KLDivLoss": "library.losses",
    "L1Loss": "library.losses",
    "MSELoss": "library.losses",
    "get_loss_function": "library.losses",
    "MetricsCalculator": "library.metrics",
    "create_model": "library.models",
    "plot_training_curves": "library.pictures",
    "visualize_predictions": "library.pictures",
    "load_study": "library.studies",
    "create_trainer": "library.trainer",
    "load_checkpoint": "library.trainer",
}
#: Module of the command `search`. It can be called as the function of the library.
_SEARCH = "search"

__all__ = [
    "__version__",
    _SEARCH,
    *_MODULES,
]


def __getattr__(name: str) -> Any:
    if name == _SEARCH:
        return importlib.import_module(f"{__name__}.{_SEARCH}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
