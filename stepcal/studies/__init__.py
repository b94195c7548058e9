"""The report's own analyses of its runs; nothing else in the package knows them."""
