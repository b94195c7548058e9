"""Somebody's own server: how wrong the model is on it, what its logs teach, and what it could serve."""
