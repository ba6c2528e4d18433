BATCH_TOKENS = 1024  # new tokens per forward of the scorer
