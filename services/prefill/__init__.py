"""The prefill service: runs prompts and holds their KV until a decode instance has pulled it."""
