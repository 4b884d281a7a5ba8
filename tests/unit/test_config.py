"""Layers of configuration, strictness, and the two-pass command line."""

import io

import pytest

from rlzoo import registry
from rlzoo.cli import main, parse_run
from rlzoo.config import build, presets, read_toml
from rlzoo.store.toml import dump_toml


@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_choosing_an_algorithm_and_nothing_else_is_the_algorithm(name):
    config, out, resume = parse_run(["--algo", name])
    assert config.algorithm == registry.find("algorithm", name)
    assert out is None and not resume


@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_config_toml_round_trips(name, tmp_path):
    config, _, _ = parse_run(["--algo", name, "--seed", "3", "--optim.lr", "0.0003"])
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config.to_dict()))
    again, _, _ = parse_run(["--config", str(file)])
    assert again == config


def test_later_layers_win(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('algo = "treerpo"\nseed = 5\n[credit]\nprune_tau = 0.3\n[optim]\nlr = 0.002\n')
    config, _, _ = parse_run(["--config", str(file), "--optim.lr", "0.005"])
    assert (config.algo, config.seed, config.algorithm.credit.prune_tau, config.algorithm.optim.lr) == ("treerpo", 5, 0.3, 0.005)
    other, _, _ = parse_run(["--config", str(file), "--algo", "grpo", "--credit", "siblings"])
    assert other.algo == "grpo" and other.algorithm.credit.name == "siblings"


def test_parts_cross_by_flag():
    config, _, _ = parse_run(["--algo", "grpo", "--sampler", "nary", "--sampler.branching", "3"])
    assert config.algorithm.sampler.name == "nary" and config.algorithm.sampler.branching == 3
    assert config.algorithm.credit.name == "group"
    config, _, _ = parse_run(["--algo", "grpo", "--credit", "siblings", "--credit.adv-norm", "none"])
    assert config.algorithm.sampler.name == "chains" and config.algorithm.credit.adv_norm == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('algo = "nosuch"', r"unknown algorithm 'nosuch'; known: "),
        ("seed = 1", r"no algorithm chosen; --algo NAME with one of: "),
        ('algo = "grpo"\nnosuch = 1', r"c.toml: unknown key 'nosuch'; allowed: model, "),
        ('algo = "grpo"\n[optim]\nnosuch = 1', r"c.toml: unknown key optim.nosuch; allowed: lr, "),
        ('algo = "grpo"\n[optim]\nlr = "high"', r"c.toml: optim.lr is 'high'; allowed: a number from 1e-12 to 10"),
        ('algo = "grpo"\n[schedule]\nsteps = 1.5', r"c.toml: schedule.steps is 1.5; allowed: a whole number from 0 to 2147483647"),
        ('algo = "grpo"\n[filter]\ndrop_dead = 1', r"c.toml: filter.drop_dead is 1; allowed: true or false"),
        ('algo = "grpo"\noptim = 3', r"c.toml: optim is 3; allowed: a table of options"),
        ('algo = "grpo"\n[optim]\nlr = -1.0', r"c.toml: optim.lr is -1.0; allowed: a number from 1e-12 to 10"),
        ('algo = "grpo"\n[credit]\nname = "nosuch"', r"unknown credit 'nosuch'; known: "),
        ('algo = "grpo"\nseed = -1', r"c.toml: seed is -1; allowed: a whole number from 0 to "),
        ('algo = "grpo"\n[backend]\nthreads = -1', r"c.toml: backend.threads is -1; allowed: a whole number from 0 to "),
        ("algo = ", r"c.toml is not TOML"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(text, message, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        parse_run(["--config", str(file)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", presets())
def test_every_shipped_recipe_is_a_valid_run(name):
    config, _, _ = parse_run(["--preset", name])
    assert config.algorithm.sampler.max_response_tokens > 0
    config, _, _ = parse_run(["--preset", name, "--optim.lr", "0.5"])
    assert config.algorithm.optim.lr == 0.5


def test_missing_files_and_presets_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.toml: No such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="unknown preset 'nosuch'"):
        parse_run(["--preset", "nosuch"])
    with pytest.raises(ValueError, match="no algorithm chosen"):
        build([])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.learning-rate", "1"], r"unknown option '--optim.learning-rate'; did you mean --optim\.\S+"),
        (["--zzz", "3"], "unknown option '--zzz'; `rlzoo run --help` lists what is allowed"),
        (["--seed", "1", "--seed", "abc"], "^--seed abc is not allowed; expected INT$"),
        (["--schedule.steps=abc"], "^--schedule.steps abc is not allowed; expected INT$"),
        (["--schedule.steps", "-1"], "^schedule.steps is -1; allowed: a whole number from 0 to 2147483647$"),
        (["--backend.dtype", "float8"], r"^invalid choice 'float8' for argument '--backend.dtype'. Expected one of \('float32', .*\).$"),
        (["--resume=3"], "^argument --resume: ignored explicit argument '3'$"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_mistakes_in_flags_are_one_sentence_in_any_terminal(flags, message, encoding, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))  # decides how the parser draws
    with pytest.raises(ValueError, match=message) as caught:
        parse_run(["--algo", "grpo", *flags])
    assert "\n" not in str(caught.value)


def test_a_verb_that_fails_says_so_once(capsys):
    assert main(["show"]) == 2 and capsys.readouterr().err == "rlzoo: Missing from rlzoo show: PATH run (required)\n"
    assert main(["tiny", "build", "--steps", "3"]) == 2 and "--out" in capsys.readouterr().err
