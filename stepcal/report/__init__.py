"""The book: execution, figures, tables, display."""
