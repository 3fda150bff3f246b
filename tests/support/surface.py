"""Names that the contract promises: files and columns."""

FILES = {
    "study": ("study.yaml", "optuna.journal", "trials.csv", "curves.parquet", "report.html"),
    "trial": (
        "params.json",
        "data.txt",
        "history.jsonl",
        "last.safetensors",
        "best.safetensors",
        "predictions.safetensors",
    ),
    "confirmation": ("confirmed", "confirmed.csv"),
    "export": ("model.safetensors", "config.json", "metrics.json", "README.md"),
}


COLUMNS = (
    "trial_id", "status", "epochs", "best_val_js", "val_js", "val_kl", "val_tvd", "val_mse", "val_emd", "seconds",
    "params_millions",
)  # fmt: skip
