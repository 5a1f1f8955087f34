"""Networks and weights."""
