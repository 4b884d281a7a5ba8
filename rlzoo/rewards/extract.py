"""From a response to the text of its answer, and from a gold answer to text that a LaTeX parser reads as it was meant.

Standard library only: the training process and the grading workers both import this module.
"""

from __future__ import annotations

import re

from rlzoo.rewards.notation import rewrite

MAX_ANSWER_CHARS = 2_000
"""A longer answer counts as unparsable: the longest gold of the common test sets has 130 characters."""
TAIL_CHARS = 4_000
"""How much of the end of a response is searched when it has no box (and a box is not required)."""

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_SEPARATORS = re.compile(
    r"(?:[\s,;.$&]|\b[A-Za-z](?:_(?:\w|\{\w{1,3}\}))? ?=|\\[()\[\],;:! ]|\\q?quad|\\text\s*\{\s*,?\s*(?:and|or)?\s*\}|\b(?:and|or)\b)*"
)
_MAX_GAP = 60
_THOUSANDS = re.compile(r"\\?\$?-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}` (or `\\fbox{...}`), or None.

    Last means: opened last. Of nested boxes the innermost counts; a box that is never closed does not count.
    Escaped braces are text. One pass, linear in the length of `text`.
    """
    boxes = last_boxes(text)
    return boxes[-1] if boxes else None


def last_boxes(text: str) -> list[str]:
    """The last complete box, preceded by the boxes that stand right before it with nothing but separators between
    (`\\boxed{1}, \\boxed{2} and \\boxed{3}`): they are one answer where a list is asked for. Linear, as `last_boxed`."""
    first = min((i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0), default=-1)
    if first < 0:
        return []
    stack: list[tuple[int, int]] = []  # (start of the command, start of the content); -1 for any other brace
    closed: list[tuple[int, int, int]] = []  # (start of the command, start of the content, end of the content)
    for match in _TOKEN.finditer(text, first):
        token = match[0]
        if token == "}":
            command, start = stack.pop() if stack else (-1, -1)
            if command >= 0 and not (closed and closed[-1][0] > command):  # not around a box that counts already
                closed.append((command, start, match.start()))
        elif token == "{":
            stack.append((-1, -1))
        elif token[-1] == "{" and len(token) > 2:
            stack.append((match.start(), match.end()))
    found: list[str] = []
    below = len(text)
    for command, start, end in reversed(closed):
        gap = text[end + 1 : below] if found else ""
        if len(gap) > _MAX_GAP or not _SEPARATORS.fullmatch(gap):
            break
        found.append(text[start:end].strip())
        below = command
    return found[::-1]


def is_list(answer: str) -> bool:
    """Whether an answer enumerates several values: a comma or semicolon outside all brackets but those around the whole."""
    text = answer.replace(r"\{", "{").replace(r"\}", "}").replace("{,}", "").replace(r"\,", "").replace(r"\!", "").strip("$ ")
    if _THOUSANDS.fullmatch(text.replace(" ", "")):
        return False
    if text[:1] == "{" and text[-1:] == "}":
        text = text[1:-1]
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth <= 0:
            return True
    return False


def tidy(answer: str) -> str:
    """An answer on one line, without lone surrogates, in notation that the parser reads as it was meant (`notation.rewrite`). What is
    longer than MAX_ANSWER_CHARS is no answer and stays as it is."""
    answer = " ".join(answer.encode("utf-8", "replace").decode("utf-8").split())
    return answer if len(answer) > MAX_ANSWER_CHARS else rewrite(answer)


def gold_answer(gold: str) -> str:
    """The bare answer of a gold string: the content of its last box where it has one, tidied, without outer dollars.

    The worker wraps it in a box before parsing, because bare LaTeX is misread (108 of the 500 MATH-500 golds).
    """
    boxed = last_boxed(gold)
    answer = tidy(gold if boxed is None else boxed)
    if len(answer) > 2 and answer[0] == "$" == answer[-1] and "$" not in answer[1:-1] and answer[-2] != "\\":
        answer = answer[1:-1].strip()
    return answer
