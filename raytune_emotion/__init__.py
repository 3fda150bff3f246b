"""raytune_emotion: finds the model that predicts distributions of emotion best from faces."""

__version__ = "0.1.0"
