"""Many configurations, searched: Ray Tune, Ray Train and Optuna."""
