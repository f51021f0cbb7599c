"""evomerge finds the coefficients with which fine-tuned checkpoints of one base model should be merged."""
