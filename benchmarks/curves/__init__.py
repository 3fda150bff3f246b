"""Learning curves of configurations that were trained to their end, and studies replayed on them."""
