"""Bad input and faults end in one clear sentence, a non-zero exit and nothing lost.

Exit status 2: refused before anything happened, and nothing is left. 1: a fault while running; what was done is left whole, and
`--resume` goes on with it.
"""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlzoo import cli
from rlzoo.rewards.math import Grader, GraderConfig
from rlzoo.store.runs import RunFolder
from rlzoo.store.trees import read_trees
from rlzoo.training import checkpoint

SMALL = [
    "--schedule.problems-per-step", "2", "--evaluation.suite", "none", "--evaluation.every", "0", "--backend.capacity", "16",
    "--backend.threads", "1",
]  # fmt: skip
SHORT = ["--sampler.group-size", "4", "--sampler.max-response-tokens", "16"]
GOOD = [{"id": f"p{i}", "problem": f"What is {i} plus 12?", "answer": str(i + 12)} for i in range(6)]


def mixed(items):
    """A plug-in reward: right or wrong by a hash of the response."""
    return [zlib.crc32(text.encode()) % 2 == 0 for _, text in items]


def write_problems(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def command(tmp_path, monkeypatch, model_folder):
    """A run that would work, as a list of arguments without its --out, with this file's functions as plug-ins `faults:…`."""
    monkeypatch.setitem(sys.modules, "faults", sys.modules[__name__])
    problems = write_problems(tmp_path / "problems.jsonl", *GOOD)
    return ["run", "--algo", "grpo", "--model", str(model_folder), "--problems", str(problems), "--reward", "faults:mixed", *SMALL, *SHORT]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} if folder.is_dir() else None


def one_sentence(said):
    """The last line on stderr; those before it may only be the progress of the run."""
    *before, last = said.strip().splitlines()
    assert last.startswith("rlzoo: ") and all(line.startswith("[") for line in before), said
    return last.removeprefix("rlzoo: ")


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that runs a command line which must be refused, and returns its sentence."""

    def check(argv, out=None):
        out = out or tmp_path / "deep" / "run"
        before = files(tmp_path)
        assert cli.main([*argv, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert "[" not in said.split("rlzoo: ")[0], "something had started"
        assert files(tmp_path) == before and not (tmp_path / "deep").exists()
        return one_sentence(said)

    return check


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algo", "nosuch"], "unknown algorithm 'nosuch'; known: grpo, "),
        (["--algo"], "argument --algo: expected one argument"),
        (["--sampler", "nosuch"], "unknown sampler 'nosuch'; known: chains, "),
        (["--preset", "nosuch"], "unknown preset 'nosuch'; known: "),
        (["--config", "nosuch.toml"], "cannot read nosuch.toml: No such file or directory"),
        (["--schedule.stepz", "3"], "unknown option '--schedule.stepz'; did you mean --schedule.steps"),
        (["--schedule.steps", "abc"], "--schedule.steps abc is not allowed; expected INT"),
        (["--schedule.steps=1.5"], "--schedule.steps 1.5 is not allowed; expected INT"),
        (["--schedule.steps"], "Missing value for argument '--schedule.steps'"),
        (["--optim.lr", "fast"], "--optim.lr fast is not allowed; expected FLOAT"),
        (["--backend.dtype", "float8"], "invalid choice 'float8' for argument '--backend.dtype'. Expected one of ('float32', 'float64'"),
        (["--schedule.steps", "-1"], "schedule.steps is -1; allowed: a whole number from 0 to "),
        (["--backend.threads", "-1"], "backend.threads is -1; allowed: a whole number from 0 to "),
        (["--backend.capacity", "0"], "backend.capacity is 0; allowed: a whole number from 1 to "),
        (["--evaluation.dev-k", "0"], "evaluation.dev_k is 0; allowed: a whole number from 1 to "),
        (["--checkpoints.last", "0"], "checkpoints.last is 0; allowed: a whole number from 1 to "),
        (["--update.token-budget", "0"], "update.token_budget is 0; allowed: a whole number from 1 to "),
        (["--seed", "-1"], "seed is -1; allowed: a whole number from 0 to "),
        (["--max-prompt-tokens", "-5"], "max_prompt_tokens is -5; allowed: a whole number from 0 to "),
        (["--optim.lr", "nan"], "optim.lr is nan; allowed: a number from 1e-12 to 10"),
        (["--optim.lr", "1e-320"], "optim.lr is 1e-320; allowed: a number from 1e-12 to 10 (other than 0: of size 1e-30 to 1e+30)"),
        (["--sampler.temperature", "1e-320"], "sampler.temperature is 1e-320; allowed: a number from 0.01 to 1000, or 0"),
        (["--sampler.temperature", "0.001"], "sampler.temperature is 0.001; allowed: a number from 0.01 to 1000, or 0"),
        (["--shaping.right", "inf"], "shaping.right is inf; allowed: a number from -1000000 to 1000000"),
        (
            ["--seed", "1" * 400],
            "11111... (400 characters); allowed: a whole number from 0 to ",
        ),
        (["--seed", "1" * 5000], " is not allowed; expected INT"),
        (["--schedule.steps", "3.0"], "--schedule.steps 3.0 is not allowed; expected INT"),
        (
            ["--sampler.group-size", "1"],
            "sampler chains gives one response per problem, and credit group compares",
        ),
        (["--sampler.group-size", "1000000"], "sampler.group_size is 1000000; allowed: a whole number from 1 to 65536"),
        (
            [
                "--algo",
                "treerpo",
                "--sampler",
                "nary",
                "--sampler.branching",
                "4",
                "--sampler.segment-tokens",
                "4",
                "--sampler.depth",
                "40",
            ],
            "sampler.branching = 4 on 40 levels makes 4^40 responses per problem; allowed: at most 65536",
        ),
        (["--sampler.top-p", "0.9"], "sampler chains draws from a cut distribution (top_p = 0.9, top_k = 0), which loss policy does not"),
        (["--max-mismatch-kl", "-1"], "max_mismatch_kl is -1.0; allowed: a number of at least 0"),
        (["--correction.cap", "0.5"], "correction.cap is 0.5; allowed: a number of at least 1"),
        (
            ["--correction.importance", "truncated", "--correction.old-logprobs", "sampler"],
            "correction.importance = truncated would correct twice: with correction.old_logprobs",
        ),
        (["--sampler.top-k", "5"], "sampler chains draws from a cut distribution (top_p = 1.0, top_k = 5), which loss policy does not"),
        (["--backend.device", "tpu"], "backend.device = 'tpu'; allowed here: auto, cpu"),
        (["--backend.device", "cuda:7"], "backend.device = 'cuda:7'"),
        (["--backend.kind", "nosuch"], "backend.kind = 'nosuch'; allowed: auto, torch"),
        (["--trackers", "nosuch"], "unknown tracker 'nosuch'; allowed are tensorboard, "),
        (["--template", "nosuch"], "unknown template 'nosuch'"),
        (["--template", "nosuch:render"], "template 'nosuch:render' cannot be loaded: ModuleNotFoundError: No module named 'nosuch'"),
        (["--template", "faults:bad_template"], "template 'faults:bad_template' fails on problem 'p0': KeyError: 'level'"),
        (["--reward", "faults:nosuch"], "reward 'faults:nosuch' cannot be loaded: AttributeError"),
        (["--reward", "faults:GOOD"], "reward 'faults:GOOD' is not a function of"),
        (["--reward", "mathematics"], "reward 'mathematics' is neither a known name nor of the form package.module:function"),
        (["--evaluation.suite", "nosuch"], "unknown suite 'nosuch'"),
        (["--evaluation.suite", "quick", "--evaluation.data-dir", "/nosuch"], "test set amc23: no amc23.jsonl or amc23.parquet in /nosuch"),
        (["--evaluation.suite", "treepo"], "give --evaluation.data-dir, a folder with "),
        (["--backend.max-context", "30"], "problem 'p0' has a prompt of "),
        (["--backend.max-context", "5000"], "1024"),
        (
            ["--sampler.max-response-tokens", "1024"],
            "the context has room for 0; allow shorter responses, or leave long prompts out with --max",
        ),
        (["--max-prompt-tokens", "1"], "all 6 problems have prompts longer than --max-prompt-tokens 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags(flags, message, command, refused):
    command = command[: -len(SHORT)] if "nary" in flags else command  # which are options of another sampler
    assert message in refused([*command, *flags])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('algo = ["grpo"]', "algo is ['grpo']; allowed: a text"),
        ("[credit]\nname = [1, 2]", "credit.name is [1, 2]; allowed: a text"),
        ("template = [1]", "template is [1]; allowed: a text"),
        ('trackers = "tensorboard"', "trackers is 'tensorboard'; allowed: a list of texts"),
        ("[schedule]\nsteps = 3.0", "schedule.steps is 3.0; allowed: a whole number from 0 to "),
        ("[optim]\nlr = true", "optim.lr is True; allowed: a number from 1e-12 to 10"),
        ("[evaluation]\ntemperature = nan", "evaluation.temperature is nan; allowed: a number from 0.01 to 1000"),
        ("seed = 1" + "0" * 400, "seed is 1000"),
        ("seed = 1" + "0" * 5000, "is not TOML: Exceeds the limit"),
        ("\ud800", "is not UTF-8"),
    ],
    ids=lambda value: value[:20],
)
def test_values_in_files(text, message, command, refused, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(text, errors="surrogatepass")
    assert message in refused([*command, "--config", str(file)] if "algo" not in text else ["run", "--config", str(file)])


def bad_template(problem, tokenizer):
    return problem.meta["level"]


def test_measuring_that_does_not_fit_the_context_is_refused_before_training(command, refused):
    measuring = ["--evaluation.suite", "mini", "--evaluation.max-response-tokens", "1020"]
    assert "beside the longest response the context has room for 4" in refused([*command, *measuring])


def test_a_part_that_needs_what_another_does_not_give_is_refused_and_both_are_named(refused, command):
    said = refused([*command, "--algo", "grpo", "--credit", "siblings", "--shaping.right", "2"])
    assert "Siblings" in said and "Outcome" in said and "needs" in said


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD[0], '{"problem": '], "line 2 of problems.jsonl: not JSON"),
        ([GOOD[0], {"problem": "q"}], "line 2 of problems.jsonl: missing column 'answer' (or final_answer, "),
        ([], "empty problem set"),
        ([GOOD[0], GOOD[1], GOOD[0]], "duplicate id 'p0': line 1 of problems.jsonl and line 3 of problems.jsonl"),
        ([GOOD[0], GOOD[1] | {"problem": "x" * 2000}], "problem 'p1' has a prompt of 2001 tokens, but beside the longest response"),
    ],
)
def test_problem_files(rows, message, command, refused, tmp_path):
    write_problems(tmp_path / "problems.jsonl", *rows)
    assert message in refused(command)


def test_a_problem_file_that_is_not_there(command, refused, tmp_path):
    (tmp_path / "problems.jsonl").unlink()
    assert f"cannot read problem set {tmp_path}/problems.jsonl: No such file or directory" in refused(command)


def without(name):
    return lambda folder: (folder / name).unlink()


def no_tokenizer(folder):
    for file in folder.glob("tok*"):
        file.unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def change(alter):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        alter(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def poison(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def config_with(**values):
    return lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | values))


DAMAGES = {
    "missing": (shutil.rmtree, "does not exist"),
    "no config": (without("config.json"), "has no config.json; expected a folder as written by save_pretrained"),
    "broken config": (write("config.json", '{"model_type": '), "config.json is not JSON: Expecting value"),
    "empty config": (write("config.json", "{}"), "cannot be loaded: Unrecognized model"),
    "no tokenizer": (no_tokenizer, "has no tokenizer (tokenizer.json); save the model's tokenizer beside it"),
    "broken tokenizer": (write("tokenizer.json", "{}"), "no usable tokenizer"),
    "no weights": (without("model.safetensors"), "cannot be loaded"),
    "truncated weights": (truncated, "cannot be loaded"),
    "a missing tensor": (change(lambda w: w.pop("model.norm.weight")), "has no weights for model.norm.weight (1 tensors are missing)"),
    "NaN": (change(poison), "has weights that are not finite (NaN or infinite) in model.layers.1.mlp.up_proj.weight"),
    "another shape": (config_with(intermediate_size=96), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_model_folders(damage, command, refused, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    said = refused([*command, "--model", str(folder)])
    assert message in said and str(folder) in said


def test_a_tokenizer_of_a_larger_model(command, refused, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    change(lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:300].clone()}))(folder)
    config_with(vocab_size=300, eos_token_id=0, pad_token_id=0)(folder)
    assert "has an embedding of 300 rows, too few for the ids of its tokenizer, which go up to" in refused(
        [*command, "--model", str(folder)]
    )


def test_an_existing_run_is_never_touched(command, refused, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    assert f"{out} is not empty; a run never overwrites another: choose another --out, or remove it" in refused(command, out)
    assert f"{out}/notes.txt is a file; a run needs a folder" in refused(command, out / "notes.txt")
    assert f"cannot write the run folder {out}/notes.txt/run: Not a directory" in refused(command, out / "notes.txt" / "run")
    assert f"{out} is not a run folder: it has no config.toml" in refused(["run", "--resume"], out)


def test_a_refused_run_leaves_a_folder_that_was_there_as_it_was(command, refused, tmp_path):
    out = tmp_path / "empty"
    out.mkdir()
    refused([*command, "--model", "./nosuch"], out)
    assert out.is_dir() and not list(out.iterdir())


@contextlib.contextmanager
def as_somebody():
    """Root may write anywhere; so as root become an ordinary user for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder(command, capsys):
    with tempfile.TemporaryDirectory() as open_to_all:
        folder = Path(open_to_all) / "locked"
        folder.mkdir()
        problems = write_problems(Path(open_to_all) / "problems.jsonl", *GOOD)
        folder.chmod(0o555)
        Path(open_to_all).chmod(0o755)
        for out in (folder, folder / "run"):
            with as_somebody():
                assert not os.access(folder, os.W_OK, effective_ids=True)
                assert cli.main([*command, "--problems", str(problems), "--out", str(out)]) == 2
            assert one_sentence(capsys.readouterr().err) == f"cannot write the run folder {out}: Permission denied"
        assert not list(folder.iterdir())


# --- faults while running ----------------------------------------------------------------------------------------------------------


def left_whole(out, steps, newest):
    """A run that stopped with an error: its config, `steps` whole rows and tree files, the checkpoint of step `newest`; no pieces."""
    folder = RunFolder.open(out)
    assert folder.config()["algo"] == "grpo"
    text = (out / "metrics.jsonl").read_text() if steps else ""
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, steps + 1)) and text[-1:] in ("", "\n")
    for step in range(1, steps + 1):
        assert len(read_trees(folder.trees_path(step))) == 2
    found = checkpoint.steps(folder.checkpoints)
    assert (found[-1] if found else None) == newest
    for step in found:
        assert all(torch.isfinite(w).all() for w in load_file(folder.checkpoints / f"step-{step}" / "model.safetensors").values())
    assert not [p for p in out.rglob(".*") if p.name != ".lock"] and not (out / "final").exists() and folder.summary() is None


def stopped(command, out, capsys, message):
    """The run ends with status 1 and a sentence that names `message` and the way on."""
    assert cli.main([*command, "--out", str(out)]) == 1
    said = one_sentence(capsys.readouterr().err)
    assert message in said and said.endswith(f"; once that is mended, go on with rlzoo run --resume --out {out}"), said


def resumed(out):
    assert cli.main(["run", "--resume", "--out", str(out)]) == 0
    return [row["step"] for row in RunFolder.open(out).metrics()]


FAULT = {"after": 0}


def faulty(items, answer):
    """The answer of `mixed`, the first calls (one per tree) only; then what `answer` says."""
    FAULT["after"] -= 1
    return mixed(items) if FAULT["after"] >= 0 else answer(items)


def raises(items):
    return faulty(items, lambda items: {}["score"])


def miscounts(items):
    return faulty(items, lambda items: [1.0])


def talks(items):
    return faulty(items, lambda items: ["good"] * len(items))


def infinite(items):
    return faulty(items, lambda items: [float("inf")] * len(items))


def nothing(items):
    return faulty(items, lambda items: None)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raises", "after step 1: reward faults:raises failed: KeyError: 'score'"),
        ("miscounts", "after step 1: reward faults:miscounts returned 1 values for 4 responses"),
        ("talks", "after step 1: reward faults:talks returned 'good'; allowed are verdicts, booleans and finite numbers (to"),
        ("infinite", "after step 1: reward faults:infinite returned inf; allowed are"),
        ("nothing", "after step 1: reward faults:nothing failed: TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_reward_that_misbehaves(reward, message, command, tmp_path, capsys):
    out = tmp_path / "run"
    FAULT["after"] = 2
    stopped([*command, "--reward", f"faults:{reward}", "--schedule.steps", "2", "--checkpoints.every", "1"], out, capsys, message)
    left_whole(out, steps=1, newest=1)
    FAULT["after"] = 1000  # mended
    assert resumed(out) == [1, 2]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
def test_a_backend_that_raises_in_the_middle_of_a_tree(error, command, tmp_path, capsys, monkeypatch):
    from rlzoo.backends.torch import TorchBackend
    from rlzoo.training import collect

    real_grow, real_step, now = collect.grow_iter, TorchBackend.step, {}

    def grow_iter(*args, step, **kwargs):
        now["step"] = step
        yield from real_grow(*args, step=step, **kwargs)

    def step(self):
        if now.get("step") == 1 and self._running:
            raise error("the engine is gone")
        return real_step(self)

    monkeypatch.setattr(collect, "grow_iter", grow_iter)
    monkeypatch.setattr(TorchBackend, "step", step)
    out = tmp_path / "run"
    stopped([*command, "--schedule.steps", "2", "--checkpoints.every", "1"], out, capsys, "after step 1: the engine is gone")
    left_whole(out, steps=1, newest=1)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "faults", sys.modules[__name__])
    assert resumed(out) == [1, 2]


KILLED = """
import os, signal, sys
import rlzoo.rewards.judge as judge_module
import rlzoo.rewards.worker as worker
judge_module.judge = lambda *pair: os.kill(os.getpid(), signal.SIGKILL)
worker.main()
"""


def test_a_grader_that_always_dies(command, tmp_path, capsys, monkeypatch):
    from rlzoo.training import collect

    config = GraderConfig(workers=2)
    monkeypatch.setattr("rlzoo.rewards.math.Grader", lambda given: Grader(config, command=[sys.executable, "-c", KILLED, "{}"]))
    monkeypatch.setattr(collect, "decode_leaves", lambda tree, tokenizer: tuple(f"\\boxed{{x+{i}}}" for i in range(len(tree.leaves))))
    out = tmp_path / "run"
    message = "after step 0: grading itself failed for 8 of 8 responses (allowed: 1%)"
    stopped([*command, "--reward", "math", "--trackers", "none", "--schedule.steps", "1"], out, capsys, message)
    left_whole(out, steps=0, newest=None)
    assert not psutil.Process().children(recursive=True)
    monkeypatch.undo()
    assert resumed(out) == [1]


@pytest.mark.parametrize(
    ("limit", "flags", "message", "newest"),
    [
        (4_000, ["--trackers", "none"], "after step 1: {out}/trees/step-1.parquet: File too large", None),
        (200_000, [], "after step 1: cannot write a checkpoint: ", None),  # within the weights
        (500_000, [], "after step 1: cannot write a checkpoint: ", None),  # within the optimizer's state
        (14_000, ["--checkpoints.every", "0", "--trackers", "none"], "{out}/metrics.jsonl: File too large", None),
        (300, [], "cannot write the run folder {out}: File too large", "refused"),
    ],
    ids=["trees", "weights", "optimizer", "metrics", "config"],
)
def test_a_full_disk(limit, flags, message, newest, command, tmp_path, capsys):
    out = tmp_path / "run"
    command = [*command, "--schedule.steps", "16", "--checkpoints.every", "1", *flags]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        if newest == "refused":
            assert cli.main([*command, "--out", str(out)]) == 2
            assert one_sentence(capsys.readouterr().err) == message.format(out=out) and not out.exists()
            return
        stopped(command, out, capsys, message.format(out=out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    steps = len(RunFolder.open(out).metrics())
    assert steps == 0 if "trees" in message else 8 < steps < 16 if "metrics" in message else steps == 1
    left_whole(out, steps, newest)
    assert resumed(out) == list(range(1, 17))


LIMITED = """
import resource, sys
from rlzoo.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def test_a_full_disk_under_tensorboard_which_writes_in_a_thread(command, tmp_path):
    """A process of its own: what a thread or the interpreter's end would print must not stand beside the sentence."""
    out = tmp_path / "run"
    (tmp_path / "plugin.py").write_text("def mixed(items):\n    return [len(text) % 2 == 0 for _, text in items]\n")
    flags = ["--reward", "plugin:mixed", "--schedule.steps", "16", "--checkpoints.every", "0", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": "/proc/nobody"}  # where not even root can write: not needed
    argv = [sys.executable, "-c", LIMITED, "14000", *command, *flags]  # its events outgrow all other files
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    said = one_sentence(done.stderr)
    assert done.returncode == 1 and f": {out}/tensorboard: File too large; once that is mended, go on with rlzoo run --resume" in said
    left_whole(out, len(RunFolder.open(out).metrics()), None)
