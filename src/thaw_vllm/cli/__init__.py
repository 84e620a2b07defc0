"""The command line: one command a file; importing any of them loads neither torch nor an engine."""
