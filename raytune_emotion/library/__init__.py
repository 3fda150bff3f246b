"""Offer the project as a library to scripts and notebooks: `from raytune_emotion import create_model, search, …`.

Each function and class is a thin layer over `data`, `learn` and the commands, and computes the same numbers.
Predictions and targets are probabilities [N, K], with one row per face, in the order of the classes.
"""
