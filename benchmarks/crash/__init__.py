"""Stages killed at instants of a recorded seed, run again, and compared with a straight run."""
