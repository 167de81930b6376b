"""The record of runs: run folders, checkpoints, plots, locks, and the index of all run folders."""
