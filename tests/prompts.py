"""Prompts of different kinds and lengths, from 3 to some 200 tokens, and how their answers are to be cut."""

from __future__ import annotations

from typing import Any

TEXTS = (  # continued as they are
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Die Hauptstadt von Deutschland heißt",
    "SELECT name, price FROM products WHERE",
    "Water boils at 100 degrees Celsius, while it freezes at",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three primary colours are red,",
    "import asyncio\n\nasync def main() -> None:\n    ",
    "La lune éclairait la mer, et le vieux pêcheur",
    "Ingredients: 200 g flour, 2 eggs, 300 ml milk, a pinch of salt.\nMethod:",
    "Question: What is 17 + 25?\nAnswer:",
    "<html>\n<head>\n<title>",
    "In 1969, two astronauts walked on the Moon for the first time. Their names were",
    "🙂 means happy, 😢 means sad, and 😡 means",
)
MESSAGES = (  # answered through the chat template
    "Say hello in five languages.",
    "What is the difference between a list and a tuple in Python?",
    "Write a haiku about autumn.",
    "Explain to a child why the sky is blue.",
    "Give me three names for a black cat.",
    "Is 97 a prime number? Think step by step.",
    "Translate 'good morning, how are you?' into Spanish.",
    "How do I boil an egg?",
    "Write one sentence that contains the words bridge, lantern and orange.",
    "What should I pack for a weekend in the mountains in spring? It may rain, and I travel by train with one bag.",
    "Sort these numbers from small to large: 42, 7, 19, 3, 88, 61, 5.",
    "Correct the grammar of this sentence: 'Yesterday I goed to the store and buyed two breads.'",
    "Write a short e-mail to my landlord. The heating in the kitchen has not worked since Tuesday, I have tried to "
    "bleed the radiator, and I shall be at home on Friday afternoon and on Monday morning. Be polite but firm, and ask "
    "when somebody can come to repair it.",
    "Summarise this in one sentence: The lighthouse on the northern cape was built in 1871, after three ships had run "
    "aground within a single winter. Its keepers lived there with their families until 1964, when the lamp was made "
    "automatic. Today the house is a small museum. Visitors can climb the 118 steps to the gallery, see the old lens, "
    "and on clear days make out the islands on the horizon. The museum is open from May to September.",
    "Here is a log of a small server. At 02:10 the disk was 81 percent full. At 02:40 a backup started. At 02:55 the "
    "disk was 97 percent full and the database began to refuse writes. At 03:05 the backup was stopped by hand and its "
    "partial file was deleted. At 03:06 the database accepted writes again, and the disk was 82 percent full. At 03:30 "
    "somebody moved the older backups to another machine, which left the disk at 44 percent. Nothing else happened "
    "until the morning. What was the cause of the problem, how was it ended, and what would you change so that it does "
    "not come back? Answer in three short points, and name the times that support each of them.",
    "A train leaves at 9:40 and arrives at 12:05. How long does the journey take?",
)


def prompt_token_ids(tokenizer: Any) -> list[list[int]]:
    """All 32 as tokens, neighbours of different kinds and lengths; ``tokenizer`` is one of transformers."""
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    for message in MESSAGES:
        chat = [{"role": "user", "content": message}]
        prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    return [prompt for pair in zip(prompts[:16], prompts[16:], strict=True) for prompt in pair]
