"""MATH and GSM8K training problems through the command line, with a local model in Qwen2.5's layout; every registered algorithm."""

import json
import os
import re
import shutil
import sys
import zlib
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rlzoo import registry
from rlzoo.cli import main
from rlzoo.data.loading import load_problems
from rlzoo.rewards.math import Grader, Kind
from rlzoo.store.runs import RunFolder
from rlzoo.store.trees import read_trees
from rlzoo.training.models import PROBES, load_model, load_tokenizer

DATA = Path(os.environ.get("RLZOO_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
TRAIN = ("math_train", "gsm8k_train", "math_train_level3to5")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data folder")

SMALL = [
    "--schedule.steps", "3", "--schedule.problems-per-step", "2", "--filter.refill-rounds", "1", "--evaluation.suite", "none",
    "--evaluation.every", "0", "--backend.capacity", "32", "--backend.threads", "1", "--trackers", "none",
]  # fmt: skip
SHORT = {
    "chains": ["--sampler.group-size", "4", "--sampler.max-response-tokens", "12"],
    "nary": ["--sampler.branching", "2", "--sampler.segment-tokens", "6", "6"],
    "segments": ["--sampler.depth", "3", "--sampler.segment-tokens", "6", "--sampler.width", "4", "--sampler.initial", "2"],
}


def mixed(items):
    """A plug-in reward: right or wrong by a hash of the response."""
    return [zlib.crc32(text.encode()) % 2 == 0 for _, text in items]


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder):
    monkeypatch.setitem(sys.modules, "plugin", sys.modules[__name__])

    def make(name, *flags):
        short = SHORT[registry.find("algorithm", name).sampler.name]
        argv = ["run", "--algo", name, "--model", str(model_folder), *SMALL, *short, *flags, "--out", str(tmp_path / "run")]
        assert main(argv) == 0
        return RunFolder.open(tmp_path / "run")

    return make


@pytest.fixture
def part(tmp_path):
    """The first 200 problems of a training set, as a file."""

    def cut(name):
        file = tmp_path / f"{name}.jsonl"
        with (DATA / "train" / f"{name}.jsonl").open() as lines:
            file.write_text("".join(islice(lines, 200)))
        return str(file)

    return cut


def changed(base, trained):
    before, after = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


JOBS = [("math_train", "qwen-boxed"), ("gsm8k_train", "chat")]


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(("problems", "template"), JOBS)
@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_three_steps_with_a_mixed_reward_change_the_weights(name, problems, template, run, part, model_folder):
    flags = ["--template", template, "--reward", "plugin:mixed", "--max-prompt-tokens", "500"]
    folder = run(name, "--problems", part(problems), *flags)
    rows = folder.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3] and sum(row.get("update/updates", 0) for row in rows) >= 2
    assert all(row["update/ratio_mean"] == pytest.approx(1, abs=1e-2) for row in rows if "update/updates" in row)
    assert len(changed(model_folder, folder.final)) == 26  # every tensor of the two layers, the embedding and the last norm
    ids = max(int(s.tree.tokens.max()) for step in folder.tree_steps() for s in read_trees(folder.trees_path(step)))
    assert ids < len(load_tokenizer(str(model_folder))) < 512  # nothing of the embedding's spare rows
    texts = {p.id: p for p in load_problems(part(problems))}
    for stored in read_trees(folder.trees_path(1)):
        assert (stored.record.problem, stored.record.gold) == (
            texts[stored.record.problem_id].problem,
            texts[stored.record.problem_id].answer,
        )


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(("problems", "template"), JOBS)
@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_with_the_real_grader_steps_without_a_right_answer_change_nothing_and_say_so(
    name, problems, template, run, part, model_folder, capsys
):
    folder = run(name, "--problems", part(problems), "--template", template, "--max-prompt-tokens", "500")
    rows = folder.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["pass_at_1"] == 0 and "update/updates" not in row for row in rows)
    assert all(row["verdict/unparsable"] == row["leaves"] for row in rows)
    assert changed(model_folder, folder.final) == []
    said = capsys.readouterr().err
    assert all(f"step {step}: no tree carries a signal (all right, all wrong or ungraded); weights stay" in said for step in (1, 2, 3))


@needs_data
@pytest.mark.data
def test_long_problems_refuse_the_run_unless_they_are_left_out(run, capsys, tmp_path, model_folder):
    source = str(DATA / "train" / "math_train.jsonl")
    argv = ["run", "--algo", "grpo", "--model", str(model_folder), "--template", "chat", "--problems", source, *SMALL, *SHORT["chains"]]
    assert main([*argv, "--out", str(tmp_path / "refused")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"rlzoo: problem 'math-train-\d+' has a prompt of \d+ tokens, but beside .* has room for 1012; .*\n", said), said
    assert "--max-prompt-tokens" in said and not (tmp_path / "refused").exists()
    folder = run("grpo", "--problems", source, "--template", "chat", "--max-prompt-tokens", "900", "--schedule.steps", "1")
    left_out = re.search(r"(\d+) of 7472 training problems left out: prompts over 900 tokens", capsys.readouterr().err)
    tokenizer = load_tokenizer(str(model_folder))
    turns = [
        [{"role": "system", "content": r"Please reason step by step, and put your final answer within \boxed{}."}, {"role": "user"}]
    ] * 7472
    prompts = [[turn[0], turn[1] | {"content": p.problem}] for turn, p in zip(turns, load_problems(source), strict=True)]
    lengths = [len(tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)) for p in prompts]
    assert left_out and int(left_out[1]) == sum(length > 900 for length in lengths) > 0
    assert folder.config()["max_prompt_tokens"] == 900


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("name", TRAIN)
def test_every_gold_comes_through_and_some_are_graded_against_themselves(name):
    source = DATA / "train" / f"{name}.jsonl"
    problems = load_problems(str(source))
    raw = [json.loads(line) for line in source.open()]
    assert [(p.id, p.problem, p.answer) for p in problems] == [(r["id"], r["problem"], r["answer"].strip()) for r in raw]
    with Grader() as grader:
        verdicts = grader.grade([(p.answer, f"Thus the answer is $\\boxed{{{p.answer}}}$.") for p in problems[::75]])
    assert [v.kind for v in verdicts] == [Kind.RIGHT] * len(verdicts)


@needs_data
@pytest.mark.data
def test_gsm8k_as_it_is_published(tmp_path):
    raw = [json.loads(line) for line in (DATA / "train" / "gsm8k_train.jsonl").open()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"question": r["problem"], "answer": r["solution"]}) + "\n" for r in raw))
    assert [(p.problem, p.answer) for p in load_problems(str(tmp_path / "train.jsonl"))] == [(r["problem"], r["answer"]) for r in raw]


# --- the tokenizer of a local folder -----------------------------------------------------------------------------------------------


def test_a_local_model_in_the_layout_of_a_released_one(model_folder):
    loaded = load_model(str(model_folder), dtype="float32", device="cpu")
    core = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    base, with_added = core.get_vocab_size(with_added_tokens=False), core.get_vocab_size()
    assert base + 3 == with_added == len(loaded.tokenizer) < loaded.model.get_input_embeddings().weight.shape[0]
    assert min(loaded.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])) == base


@pytest.mark.parametrize("digits", [True, False])
def test_ids_are_those_of_the_folders_own_tokenizer(digits, model_folder, tmp_path):
    """transformers reads a folder of model type qwen2 with Qwen2's way to cut text, whatever tokenizer.json says."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    if digits:  # a tokenizer that keeps numbers whole, and drops no accents
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        core.train_from_iterator(
            ["12 34 007 1234 don't"] * 5,
            trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=special, show_progress=False),
        )
        core.save(str(folder / "tokenizer.json"))
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    for text in [*PROBES, "don't 1234 007", "e\u0301 12 34"]:
        assert tokenizer.encode(text, add_special_tokens=False) == core.encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "again")
    shutil.copy(folder / "config.json", tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).encode(PROBES[0]) == tokenizer.encode(PROBES[0])
