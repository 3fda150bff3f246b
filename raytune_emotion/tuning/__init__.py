"""Search hyperparameters with Ray and Optuna.

Ray reads environment variables when it is imported. They are set here, because this module runs first.
"""

import os

from raytune_emotion.storage.cache import home_folder, private_folder

# Under `uv run`, Ray would upload the working folder and start each worker with another `uv run`.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# Ray cannot be imported by a user without a home folder, although it writes nothing there. The cache lies there, too.
if home_folder() is None:
    os.environ["HOME"] = str(private_folder())
