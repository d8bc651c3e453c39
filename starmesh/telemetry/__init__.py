"""Every span and attribute name (``names``), and the set-up of tracing and logging (``setup``)."""
