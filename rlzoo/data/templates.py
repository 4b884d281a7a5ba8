"""How a problem becomes the token ids of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import registry
from .problems import Problem

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""The instruction of Qwen2.5-Math's chain-of-thought prompt, used by `qwen-boxed` and `chat`."""

Template = Callable[[Problem, Any], str | list[int]]
"""Problem and tokenizer in; the prompt's text (special tokens spelled out, BOS left to `render`) or its token ids out."""


def plain(problem: Problem, tokenizer: Any) -> str:
    """The bare problem and a newline: for base models warm-started on that form."""
    return f"{problem.problem}\n"


def qwen_boxed(problem: Problem, tokenizer: Any) -> str:
    """Qwen2.5-Math's own chat format, whatever chat template the tokenizer carries.

    Raises:
        ValueError: the tokenizer lacks the turn markers, so that they would be read as loose characters.
    """
    known = tokenizer.get_vocab()
    for marker in ("<|im_start|>", "<|im_end|>"):
        if marker not in known:
            raise ValueError(f"template 'qwen-boxed' needs the token {marker}, which this tokenizer lacks; use 'plain' or 'chat'")
    system, user = f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n", f"<|im_start|>user\n{problem.problem}<|im_end|>\n"
    return f"{system}{user}<|im_start|>assistant\n"


def chat(problem: Problem, tokenizer: Any) -> list[int]:
    """The tokenizer's own chat template, the instruction as system text, or behind the problem where there is no system turn.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("template 'chat' needs a tokenizer with a chat template, and this one has none; use 'plain' or 'qwen-boxed'")
    text = _with_system(problem.problem, tokenizer)
    if text is None or INSTRUCTION not in text:  # refused the system turn, or dropped it without a word
        turns = [{"role": "user", "content": f"{problem.problem}\n\n{INSTRUCTION}"}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return [int(t) for t in tokenizer.encode(text, add_special_tokens=False)]  # the template writes its own BOS


def _with_system(problem: str, tokenizer: Any) -> str | None:
    from jinja2.exceptions import TemplateError

    turns = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": problem}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError:  # how templates without a system turn say so
        return None


TEMPLATES: dict[str, Template] = {"plain": plain, "qwen-boxed": qwen_boxed, "chat": chat}


def find_template(name: str) -> Template:
    """The template called `name`, or the function that `package.module:function` points at.

    Raises:
        ValueError: no such template, module or function.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if ":" not in name:
        raise ValueError(f"unknown template {name!r}; allowed are {', '.join(TEMPLATES)} or package.module:function")
    template = registry.plugin(name, "template")
    if not callable(template):
        raise ValueError(f"template {name!r} is not a function of a problem and a tokenizer")
    found: Template = template
    return found


def turn_ends(template: str, tokenizer: Any) -> frozenset[int]:
    """Ids that end the assistant's turn in a template, and so a response, whether or not the model's configs name them: a base model
    that writes <|im_end|> after its answer has ended it. A plug-in names its own in an attribute `turn_ends`, a function of the tokenizer.

    Raises:
        ValueError: no such template.
    """
    function = find_template(template)
    if template == "qwen-boxed":
        found = tokenizer.get_vocab().get("<|im_end|>")
        return frozenset() if found is None else frozenset({int(found)})
    if template == "chat":
        return _chat_end(tokenizer)
    named = getattr(function, "turn_ends", None)
    return frozenset() if named is None else frozenset(int(i) for i in named(tokenizer))


def _chat_end(tokenizer: Any) -> frozenset[int]:
    """The special token that a chat template writes behind the assistant's text, if it writes one."""
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
    behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("ANSWER")[2].strip()
    ids = tokenizer.encode(behind, add_special_tokens=False) if behind else []
    added = {int(i) for i in getattr(tokenizer, "added_tokens_decoder", {})} | set(tokenizer.all_special_ids)
    return frozenset(int(i) for i in ids[:1] if int(i) in added)


def render(template: str, problem: Problem, tokenizer: Any) -> list[int]:
    """Token ids of the prompt, int list. BOS stands in front once if the tokenizer wants one; an EOS never follows.

    Raises:
        ValueError: unknown template, one that fails or is unfit for this tokenizer, or an empty prompt.
    """
    function = find_template(template)
    try:
        with registry.staying_put():
            made = function(problem, tokenizer)
        ids = _encode(made, tokenizer) if isinstance(made, str) else [int(t) for t in made]
    except ValueError:
        raise
    except Exception as error:  # a plug-in's code, whatever it raises
        raise ValueError(f"template {template!r} fails on problem {problem.id!r}: {type(error).__name__}: {error}") from error
    if not ids:
        raise ValueError(f"template {template!r} makes an empty prompt of problem {problem.id!r}")
    return ids


def fitting(problems: Sequence[Problem], template: str, tokenizer: Any, *, room: int, at_most: int = 0) -> tuple[list[Problem], int]:
    """The problems whose prompts have `at_most` tokens (0: all of them), and the length of the longest prompt among them.

    Raises:
        ValueError: a prompt does not fit into the `room` that responses leave of the context, or every problem is left out.
    """
    kept, longest = [], 0
    for problem in problems:
        length = len(render(template, problem, tokenizer))
        if at_most and length > at_most:
            continue
        if length > room:
            raise ValueError(
                f"problem {problem.id!r} has a prompt of {length} tokens, but beside the longest response the context has room for "
                f"{max(0, room)}; allow shorter responses, or leave long prompts out with --max-prompt-tokens"
            )
        kept.append(problem)
        longest = max(longest, length)
    if problems and not kept:
        raise ValueError(f"all {len(problems)} problems have prompts longer than --max-prompt-tokens {at_most}")
    return kept, longest


def _encode(text: str, tokenizer: Any) -> list[int]:
    # A tokenizer may add EOS as well as BOS when asked for special tokens, and a prompt must not end the text: so ask for none,
    # and put in front only the BOS that it would have put there.
    ids = [int(t) for t in tokenizer.encode(text, add_special_tokens=False)]
    bos = getattr(tokenizer, "bos_token_id", None)
    wanted = list(tokenizer.encode("", add_special_tokens=True))
    if bos is not None and wanted[:1] == [bos] and ids[:1] != [bos]:
        return [int(bos), *ids]
    return ids
