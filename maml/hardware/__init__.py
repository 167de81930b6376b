"""Devices, processes, compilation, memory and precision of a run."""
