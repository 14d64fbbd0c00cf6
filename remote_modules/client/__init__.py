"""The client: a list of blocks that run elsewhere."""
