"""SRPO in the loops that people already run."""
