"""`lightx2v bench`: how long the engine's work takes, and the same work by other libraries in the same process."""
