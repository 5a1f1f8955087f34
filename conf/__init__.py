"""What can be chosen: YAML for values, `cli.py` to turn them into typed dataclasses once."""
