"""The processes of the mesh: a folder is a process, run as ``python -m services.<name>``. None imports another."""
