"""Assets to posed views to shards to batches, and camera mathematics."""
