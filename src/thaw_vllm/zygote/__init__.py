"""A process that has imported everything and touched no device; programs run as forks of it, so none imports anew."""
