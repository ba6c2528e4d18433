BATCH_TOKENS = 2048  # new tokens per forward of the scorer
