"""What a run leaves behind: its folder, checkpoints, pictures, and the index of all run folders."""
