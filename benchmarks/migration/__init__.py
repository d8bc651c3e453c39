"""What a live migration costs: see ``__main__``."""
