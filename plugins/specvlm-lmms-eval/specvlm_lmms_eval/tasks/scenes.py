"""The chat of a row of questions.jsonl."""

from typing import Any

from specvlm.strategies.datasets.synthetic import clip


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """Render the scene and put the question."""
    content = [{"type": "video", "url": clip(doc["scene"])}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]
