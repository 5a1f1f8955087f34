"""What this machine has and lacks for each thing that the project does."""
