"""From a batch to microseconds: decomposition, corrections, baselines, the physical model, coefficient files."""
