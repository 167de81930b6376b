"""Sweeps: a record and a summary of all jobs, and one GPU per job."""
