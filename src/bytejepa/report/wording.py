"""Words of a caption that are about several configurations."""

from __future__ import annotations

from collections.abc import Mapping


def once_or_each(words: Mapping[str, str]) -> str:
    """Return the words about every configuration, by its label: once where they are alike, else each with whose they are."""
    labels: dict[str, list[str]] = {}
    for label, text in words.items():
        labels.setdefault(text, []).append(label)
    if len(labels) == 1:
        return next(iter(labels))
    return "; ".join(f"{text} ({', '.join(of)})" for text, of in labels.items())
