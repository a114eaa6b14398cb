"""What people write, in the form that the text encoder was trained on."""

import html
import re

import ftfy


def clean(prompt: str) -> str:
    """The prompt with broken encodings mended, HTML entities resolved, and every run of white space one blank.

    Source: the reference implementation of arXiv 2512.04677. Entities are resolved twice: some texts are escaped twice.
    """
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", mended).strip()
