"""The paper's open questions, answered with numbers on a small world of real objects."""
