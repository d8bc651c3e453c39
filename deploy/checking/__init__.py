"""What deploy/check is made of: the compose cluster, and what is tried on it. Standard library only."""
