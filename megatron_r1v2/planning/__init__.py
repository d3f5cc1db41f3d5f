"""What a run costs before it is started: bytes on each rank, seconds a step, and the layout that suits best."""
