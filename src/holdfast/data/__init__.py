"""Data: files into rows, rows into tokens, tokens into a mix, and the task made of them."""
