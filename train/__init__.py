"""Both training stages."""
