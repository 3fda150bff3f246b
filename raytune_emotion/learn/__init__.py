"""Train one configuration: plain PyTorch, without Ray and without Optuna."""
