"""The only sockets of the package."""
