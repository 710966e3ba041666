"""Training: stages, the one step, the loop, checkpoints."""
