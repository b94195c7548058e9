"""How a study's results are kept: provenance, recordings, the cache between processes."""
