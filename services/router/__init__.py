"""The router service: the public API, and each request's way through prefill and decode instances."""
