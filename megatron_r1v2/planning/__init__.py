"""The cost of a run before it starts: bytes on each rank, seconds a step, and the best layout, by arithmetic alone."""
