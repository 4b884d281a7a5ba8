"""Text from outside (names, paths, error texts) made harmless where it enters a terminal or a Markdown page. HTML has `html.escape`."""

from __future__ import annotations

import re

_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_MARKUP = re.compile(r"\||<(?=[A-Za-z/!?])|\]\(")


def visible(text: str) -> str:
    """Control characters, line breaks, terminal escapes, overrides of direction and other unseen characters as \\x1b, \\u202e, ...: on
    a terminal they would move the cursor, hide or reorder the text beside them."""
    return _UNSEEN.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


def visible_lines(text: str) -> str:
    """`visible`, line by line."""
    return "\n".join(visible(line) for line in text.split("\n"))


def markdown(text: str) -> str:
    """A cell or a line of Markdown: visible, on one line, without the characters that end a cell, begin HTML or make a link."""
    return _MARKUP.sub(lambda m: {"|": r"\|", "<": "&lt;", "](": r"]\("}[m[0]], visible(text))
