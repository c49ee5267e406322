"""Many training runs from one file: every combination of a grid, or the trials of a search, in parallel processes."""
