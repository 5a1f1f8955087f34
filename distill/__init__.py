"""A finished checkpoint and an image to a mesh."""
