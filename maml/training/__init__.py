"""Meta-training: one loop over meta-iterations for all algorithms."""
