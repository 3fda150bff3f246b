"""Learning curves of configurations that were trained to their end, for `benchmarks.policies` to replay."""
