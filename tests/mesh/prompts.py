"""Sixteen prompts of different lengths and kinds, for streams that run together."""

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell altogether?",
    "Explain in two sentences why the sky is blue.",
    "Translate to French: good morning, my friend.",
    "List three uses of a paper clip.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Summarise: The quick brown fox jumps over the lazy dog while the cat watches from the window and yawns.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Tell me a joke about computers.",
    "Name the planets of the solar system in order.",
    "How do I boil an egg? Answer in short steps, with the time each step takes and what to look out for.",
    "Write one sentence that uses the words river, lantern and promise.",
    "Why do leaves change colour in autumn?",
]
