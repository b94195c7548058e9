"""The report's figures: tables in, figures at two widths out, in one theme."""
