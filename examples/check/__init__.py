"""Builds the example clients and tries what they show against live clusters: ``python -m examples.check``.

``clusters`` starts them, ``languages`` builds the clients, ``client`` runs one, ``trials`` says what each must show.
"""
