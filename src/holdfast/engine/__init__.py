"""One forward, packed and exact, and what several processes tell each other."""

BATCH_TOKENS = 2048  # new tokens per forward of the scorer
