"""The sections of `benchmarks/ruler.py`."""
