"""How well the simulator foretells a live cluster: the same requests through both. See ``__main__``."""
