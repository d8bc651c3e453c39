"""The router's HTTP front door: what OpenAI's clients call, answered by the same Router as the gRPC services."""
