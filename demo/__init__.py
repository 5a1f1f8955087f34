"""The whole road, small."""
