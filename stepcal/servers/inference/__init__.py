"""What measured requests say of parameters: figures, their expected errors, what is learned, what may be."""
