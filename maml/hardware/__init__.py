"""Where and how a run computes: devices, processes, compilation, memory, precision."""
