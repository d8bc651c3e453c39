"""The engine: continuous batching over a paged KV cache.

``block_pool``, ``sequence``, ``scheduler`` and ``batch`` are pure. ``kv_cache``, ``attention``, ``model`` and
``sampler`` need torch. ``engine`` joins them, and ``thread`` runs it off the event loop.
"""
