"""Drawing images from a checkpoint: what is asked for, the drawing itself, and what is kept of it."""
