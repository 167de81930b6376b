"""The meta-update: one file per outer optimizer."""
