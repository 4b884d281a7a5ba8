import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlzoo.data.problems import Problem
from rlzoo.data.templates import INSTRUCTION, render

PROBLEM = Problem("p", "What is 2+3?", "5")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<s>" + CHATML
DROPS_SYSTEM = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'system' else '' }}")


def tokenizer(*, adds: str = "", chat_template: str | None = None, markers: bool = True) -> PreTrainedTokenizerFast:
    """A character-level tokenizer; `adds` says which of BOS and EOS it puts around a text when asked for special tokens."""
    special = ["<s>", "</s>", *(["<|im_start|>", "<|im_end|>"] if markers else [])]
    vocab = {t: i for i, t in enumerate([*special, *pre_tokenizers.ByteLevel.alphabet()])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    single = " ".join(["<s>"] * ("b" in adds) + ["$A"] + ["</s>"] * ("e" in adds))
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:])
    made.chat_template = chat_template
    return made


def test_plain():
    t = tokenizer()
    assert t.decode(render("plain", PROBLEM, t)) == "What is 2+3?\n"


@pytest.mark.parametrize(("adds", "bos"), [("", 0), ("b", 1), ("be", 1), ("e", 0)])
def test_bos_once_and_never_eos(adds, bos):
    t = tokenizer(adds=adds)
    ids = render("plain", PROBLEM, t)
    assert (ids.count(t.bos_token_id), ids.count(t.eos_token_id)) == (bos, 0)
    assert t.decode(ids[bos:]) == "What is 2+3?\n"


def test_qwen_boxed_is_the_models_own_format():
    t = tokenizer(chat_template="something else")
    ids = render("qwen-boxed", PROBLEM, t)
    assert t.decode(ids) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(t.convert_tokens_to_ids("<|im_start|>")) == 3  # markers, not loose characters
    with pytest.raises(ValueError, match=r"needs the token <\|im_start\|>"):
        render("qwen-boxed", PROBLEM, tokenizer(markers=False))


def test_chat_uses_the_tokenizers_own_template():
    t = tokenizer(adds="b", chat_template="<s>" + CHATML)
    ids = render("chat", PROBLEM, t)
    assert ids.count(t.bos_token_id) == 1 and ids[0] == t.bos_token_id
    text = t.decode(ids)
    assert f"system\n{INSTRUCTION}<|im_end|>" in text and text.endswith("user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_chat_without_a_system_turn_appends_the_instruction(template):
    t = tokenizer(chat_template=template)
    assert f"What is 2+3?\n\n{INSTRUCTION}<|im_end|>" in t.decode(render("chat", PROBLEM, t))


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        render("chat", PROBLEM, tokenizer())


def shout(problem, tokenizer):
    return problem.problem.upper()


def ids(problem, tokenizer):
    return [5, 6, 7]


def spelled_out(problem, tokenizer):
    return "<s>hello"


def nothing(problem, tokenizer):
    return []


def test_plug_in():
    t = tokenizer(adds="b")
    assert t.decode(render(f"{__name__}:shout", PROBLEM, t)) == "<s>WHAT IS 2+3?"
    assert render(f"{__name__}:ids", PROBLEM, t) == [5, 6, 7]  # token ids are taken as they are
    assert render(f"{__name__}:spelled_out", PROBLEM, t).count(t.bos_token_id) == 1
    with pytest.raises(ValueError, match="makes an empty prompt of problem 'p'"):
        render(f"{__name__}:nothing", PROBLEM, t)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fancy", "unknown template 'fancy'; allowed are plain, qwen-boxed, chat or package.module:function"),
        ("no_such_module:f", "template 'no_such_module:f' cannot be loaded"),
        (f"{__name__}:missing", "cannot be loaded"),
        (f"{__name__}:PROBLEM", "is not a function"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        render(name, PROBLEM, tokenizer())
