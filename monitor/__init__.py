"""What is seen of a run: metrics.jsonl and pictures in its folder, and one W&B run, however often it starts again."""
