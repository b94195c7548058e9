"""What the book's pages cite: a function a page, from its study's tables to numbers by the name that the prose uses."""
