"""Meta-training: one outer loop over meta-iterations, whatever the algorithm."""
