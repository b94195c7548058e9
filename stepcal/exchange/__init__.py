"""Coefficients to and from other simulators: files with a schema, tables, Go source, BLIS."""
