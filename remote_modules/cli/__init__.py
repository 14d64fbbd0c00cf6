"""The command line: one file per command, for parsing arguments and printing only."""
