"""Search hyperparameters with Ray and Optuna.

Ray reads the environment when it is imported. What it must find there is set here, since this runs first.
"""

import os
import tempfile

from raytune_emotion.storage.cache import home_folder

# Below `uv run` Ray would upload the working folder and start each worker by another `uv run`.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# Ray cannot be imported by a user without a home folder, though nothing is written there.
if home_folder() is None:
    os.environ["HOME"] = tempfile.gettempdir()
