"""The training program: a DeepSpeed engine, the loop around it, and what a run leaves on disk."""
