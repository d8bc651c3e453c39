"""What predictions cost a decode instance: see ``__main__``."""
