"""Bytes to typed messages and back, without I/O. Normative description: docs/protocol.md."""
