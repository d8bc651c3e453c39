"""What a prefill and a decode instance have in common: an engine, KV to pull and be pulled, a place in the ledger,
a drain. ``services.prefill`` and ``services.decode`` add what each does with sequences.

``settings`` says how an instance is configured, ``loading`` makes its engine, ``instance`` runs it, ``servicer``
lets operators see and drain it.
"""
