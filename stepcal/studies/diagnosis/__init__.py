"""What the label measures, what batches can be rebuilt, and what the failure was due to."""
