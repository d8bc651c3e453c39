"""How well remaining lengths are predicted, by what, and at what cost: see ``__main__``."""
