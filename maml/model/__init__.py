"""The networks f_theta: one file per model."""
