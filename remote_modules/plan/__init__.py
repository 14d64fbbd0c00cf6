"""Decisions, as pure functions and small state machines: values and the time go in, an answer comes out."""
