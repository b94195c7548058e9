"""One measured run: settings, load, and what its clients saw."""
