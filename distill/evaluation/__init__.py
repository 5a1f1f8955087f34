"""How good is it?  Pictures and meshes against ground truth, and without."""
