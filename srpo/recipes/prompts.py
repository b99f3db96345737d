"""What asks a policy for perception, reasoning and an answer."""

from typing import Any

SYSTEM = (
    "You answer a question about a picture. First describe, between <perception> and </perception>, everything in the "
    "picture that the question depends on: read numbers, labels and relations off it, and conclude nothing yet. Then "
    "derive the answer between <think> and </think>, from that description. Then give the answer alone between "
    "<answer> and </answer>."
)


def conversation(question: str) -> list[dict[str, Any]]:
    """Return the messages of a question; a trainer puts the pictures before the text."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
