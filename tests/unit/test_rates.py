"""A real model is not trained at the embedded model's learning rate by accident."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoConfig

import rlzoo
from rlzoo import registry
from rlzoo.cli import main, parse_run
from rlzoo.config import presets, read_preset
from rlzoo.evaluation.compare import compare_arms
from rlzoo.training.models import count_parameters, load_model
from rlzoo.training.rates import refuse_embedded_rate

ROOT = Path(__file__).parents[2]
ALGORITHMS = registry.names("algorithm")


def folder_of(tmp_path: Path, hidden: int) -> str:
    """A model of which there is only the config: refused or not before a weight is looked for."""
    made = AutoConfig.for_model("qwen2", vocab_size=5000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=4)
    made.architectures = ["Qwen2ForCausalLM"]
    made.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def large(tmp_path: Path) -> str:
    return folder_of(tmp_path, 768)


def refused(config: rlzoo.RunConfig) -> str:
    with pytest.raises(ValueError, match=r"million parameters, and optim\.lr = ") as caught:
        refuse_embedded_rate(config)
    return str(caught.value)


def test_parameters_are_counted_by_the_config_alone(large: str) -> None:
    loaded = load_model("tiny", dtype="float32", device="cpu").model
    assert count_parameters("tiny") == sum(p.numel() for p in loaded.parameters()) < 1_000_000
    assert 20_000_000 < count_parameters(large) < 100_000_000
    assert count_parameters("./nosuch") is None


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_embedded_rate_on_a_large_model_is_refused_with_the_presets(name: str, large: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["run", "--algo", name, "--model", large, "--optim.warmup-steps", "5", "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and not out.exists()
    fitting = [p for p in presets() if read_preset(p)["algo"] == name]
    assert fitting and all(f"--preset {p}" in said for p in fitting) and "--optim.lr" in said


def test_a_given_rate_is_taken_whoever_gave_it_even_the_default(large: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    lr = registry.find("algorithm", "grpo").optim.lr
    file.write_text(f'algo = "grpo"\nmodel = "{large}"\n[optim]\nlr = {lr}\n')
    given = [
        ["--config", str(file)],
        ["--algo", "grpo", "--model", large, "--optim.lr", str(lr)],
        ["--algo", "grpo", "--model", large, f"--optim.lr={lr}"],
    ]
    given += [["--preset", p, "--model", large] for p in presets()]
    for argv in given:
        refuse_embedded_rate(parse_run(argv)[0])
    refuse_embedded_rate(rlzoo.build([("mine", {"algo": "grpo", "model": large, "optim": {"lr": lr}})]))


def test_a_rate_that_nobody_gave_is_refused_from_python_and_in_a_comparison_too(large: str, tmp_path: Path) -> None:
    refused(rlzoo.build([("mine", {"algo": "grpo", "model": large, "optim": {"warmup_steps": 1}})]))
    common = tmp_path / "common.toml"
    common.write_text(f'model = "{large}"\n')
    with pytest.raises(ValueError, match="million parameters"):
        compare_arms("grpo,treepo@lr=1e-6", seeds=1, match="steps", budget=None, jobs=1, out=tmp_path / "out", common=common)
    assert not (tmp_path / "out").exists()


def test_small_models_take_the_default_and_a_kept_config_gives_its_rate(large: str, tmp_path: Path) -> None:
    from rlzoo.store.toml import dump_toml

    small, _, _ = parse_run(["--algo", "grpo", "--model", folder_of(tmp_path / "small", 64)])
    refuse_embedded_rate(small)
    refuse_embedded_rate(parse_run(["--algo", "grpo"])[0])
    kept = tmp_path / "config.toml"  # what a run leaves and resumes from
    kept.write_text(dump_toml(parse_run(["--algo", "grpo", "--model", large, "--optim.lr", "3e-6"])[0].to_dict()))
    again, _, _ = parse_run(["--config", str(kept)])
    assert "optim.lr" in again.given and "given" not in again.to_dict()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_commands_of_the_pages_for_real_models_parse_and_give_a_rate() -> None:
    found = 0
    for page in PAGES:
        for command in re.findall(r"^(?:\.venv/bin/)?rlzoo run (.*)$", page.read_text().replace("\\\n", " "), re.M):
            argv = [word for word in shlex.split(command, comments=True) if word != "--dry-run"]
            if not {"--model", "--preset"} & set(argv):
                continue
            found += 1
            assert "optim.lr" in parse_run(argv)[0].given, (page, command)
    assert found >= 3
