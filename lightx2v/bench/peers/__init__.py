"""Other libraries that do the same work, one file each. They are imported on use, and none is needed."""
