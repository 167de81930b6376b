"""Several runs at once: what became of each, and a GPU for each."""
