"""Sessions: what a conversation with a model has come to, kept in a directory. Needs neither torch nor an engine."""
