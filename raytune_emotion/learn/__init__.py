"""One configuration, trained: plain PyTorch, without Ray and without Optuna."""
