"""Prompt cleaning, as in the text encoder's training."""

import html
import re

import ftfy


def clean(prompt: str) -> str:
    """Repair broken encodings, resolve HTML entities, and collapse white space to single spaces.

    Source: the reference implementation of arXiv 2512.04677. Entities are resolved twice: some texts are escaped twice.
    """
    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", repaired).strip()
