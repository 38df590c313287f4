"""What is inside a checkpoint and a run: for notebooks, as functions."""
