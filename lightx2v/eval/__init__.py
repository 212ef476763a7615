"""Measures what a configuration does to the result: prompt adherence on tiny-wan, and distance to another run."""
