"""Both training stages on Accelerate and DeepSpeed."""
