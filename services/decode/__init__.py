"""The decode service: pulls KV, generates tokens by continuous batching, streams them to the routers."""
