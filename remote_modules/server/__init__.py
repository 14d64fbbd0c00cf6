"""A peer that serves blocks."""
