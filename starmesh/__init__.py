"""starmesh: balanced decode for LLM serving over an asyncio gRPC mesh."""
