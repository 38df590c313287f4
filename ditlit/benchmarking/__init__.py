"""What a configuration costs before it is trained: time, memory, and how near the device comes to its limits."""
