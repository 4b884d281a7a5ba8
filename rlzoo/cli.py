"""The command line. Imports no torch until a verb needs it."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import is_dataclass, make_dataclass, replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from . import registry
from .algorithm import options
from .config import PLUGGABLE, RunConfig, build, chosen_names, flagged, presets, read_preset, read_toml
from .errors import one_line
from .escape import visible
from .store.runs import RunFolder

if TYPE_CHECKING:
    from .evaluation.options import EvalConfig

USAGE, FAILED, INTERRUPTED = 2, 1, 130  # exit statuses; that of bad input is argparse's


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. RLZOO_TRACEBACK=1 shows where an error came from."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted", INTERRUPTED)
    except (ValueError, OSError) as error:
        return _complain(one_line(error), USAGE)
    except RuntimeError as error:
        return _complain(one_line(error), FAILED)


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(), flush=True)
        return 0 if arguments else USAGE
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"rlzoo {version('rlzoo')}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _complain(f"unknown verb {verb!r}; known: {', '.join(VERBS)}", USAGE)
    return VERBS[verb](rest) or 0


def _complain(message: str, status: int) -> int:
    if os.environ.get("RLZOO_TRACEBACK"):
        import traceback

        traceback.print_exc()
    print(f"rlzoo: {visible(message)}", file=sys.stderr)
    return status


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}} {(function.__doc__ or '').strip().splitlines()[0]}" for name, function in VERBS.items()]
    return "\n".join(["usage: rlzoo VERB [OPTIONS]    (rlzoo VERB --help for its options)", "", *lines])


def parse_run(argv: Sequence[str]) -> tuple[RunConfig, Path | None, bool]:
    """Config, --out folder and --resume of a `run` command line, in two passes: first the choices, then every option as a flag.

    Raises:
        ValueError: bad file, name or value.
        SystemExit: --help.
    """
    first = argparse.ArgumentParser(prog="rlzoo run", add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "preset", "algo", *PLUGGABLE, "backend", "out"):
        first.add_argument(f"--{name}")
    first.add_argument("--resume", action="store_true")
    chosen, flags = _known(first, argv)
    layers: list[tuple[str, dict[str, Any]]] = []
    if chosen.resume:
        if not chosen.out:
            raise ValueError("--resume needs --out FOLDER, the run to go on with")
        kept = RunFolder.open(chosen.out)
        layers.append((str(kept.path / "config.toml"), kept.config()))
    if chosen.preset:
        layers.append((f"preset {chosen.preset}", read_preset(chosen.preset)))
    if chosen.config:
        layers.append((chosen.config, read_toml(chosen.config)))
    choice = {name: value for name in ("algo", *PLUGGABLE) if (value := getattr(chosen, name))}
    if not choice.get("algo") and not layers and ("-h" in flags or "--help" in flags):
        choice["algo"] = registry.names("algorithm")[0]
    if chosen.resume:  # before the options, which are those of the parts
        kept.refuse_change(chosen_names(layers[:1]), chosen_names(layers) | choice)
    base = build(layers, choice)
    flags = [*_backend_flag(chosen), *flags]
    config = replace(base.with_sections(_parse_flags(base, flags)), given=base.given | flagged(flags))
    return config, Path(chosen.out) if chosen.out else None, chosen.resume


def _known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What `parser` knows of a command line, and the rest of it."""
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error


def _backend_flag(chosen: argparse.Namespace) -> list[str]:
    return ["--backend.kind", chosen.backend] if chosen.backend else []


def _parse_flags(base: RunConfig, flags: Sequence[str]) -> dict[str, Any]:
    sections = base.sections()
    fields = [(name, type(value) if not isinstance(value, tuple) else tuple[str, ...], value) for name, value in sections.items()]
    schema = make_dataclass("RunFlags", fields, frozen=True)
    choices = (
        f"Before these: --algo {'|'.join(registry.names('algorithm'))}  --config FILE.toml  --preset {'|'.join(presets()) or 'NAME'}  "
        f"--sampler {'|'.join(registry.names('sampler'))}  --credit {'|'.join(registry.names('credit'))}  "
        f"--loss {'|'.join(registry.names('loss'))}  --backend KIND (short for --backend.kind)  --out FOLDER  --resume  --dry-run"
    )
    parsed, unknown = _parse(schema, "rlzoo run", flags, default=schema(), description=choices, return_unknown_args=True)
    if unknown and unknown[0].startswith("--backend-url"):
        raise ValueError("--backend-url goes with rlzoo eval: a server cannot take over weights, so training needs an engine of its own")
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; {_alike(unknown[0], base)}")
    return {name: getattr(parsed, name) for name, _, _ in fields}


def _parse(target: Any, prog: str, argv: Sequence[str], **options: Any) -> Any:
    """tyro's parser, with the box of text that it prints about a mistake made into one sentence. A function as `target` must
    not do its work but return it: until it returns, what is written to stderr is taken for such a box.

    Raises:
        ValueError: a flag's value is missing, of the wrong type or out of range.
        SystemExit: --help.
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(target, prog=prog, args=list(argv), **options)
    except SystemExit as error:
        if not error.code:
            raise
    lines = [line.strip(" │") for line in box.getvalue().splitlines()[1:]]  # without the title
    texts = [bool(line.strip("─-╰╯")) for line in lines]  # or a rule, of characters that depend on the terminal's encoding
    said = " ".join(takewhile(lambda line: line.strip("─-╰╯"), lines[texts.index(True) :]))
    if found := re.match(r"Error parsing (--\S+):", said):  # the reason is Python's; better: what stands there, and what should
        flag = found[1]
        expected = next((line.removeprefix(flag).strip() for line in lines if line.startswith(f"{flag} ")), "another value")
        words = " ".join(argv).replace(f"{flag}=", f"{flag} ").rpartition(f"{flag} ")[2].split()
        given = " ".join([flag, *takewhile(lambda word: not word.startswith("--"), words)])
        raise ValueError(f"{given} is not allowed; expected {expected}")
    raise ValueError(re.sub(r"^Error parsing [\w.]+: ", "", said))


def _alike(flag: str, base: RunConfig) -> str:
    known = []
    for name, value in base.sections().items():
        known += [f"--{name}.{o.replace('_', '-')}" for o in options(value)] if is_dataclass(value) else [f"--{name}"]
    close = get_close_matches(flag, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? `rlzoo run --help` lists all" if close else "`rlzoo run --help` lists what is allowed"


def _run(argv: Sequence[str]) -> int:
    """Train a model: rlzoo run --algo NAME. Ends with a table and the run folder's path. With --dry-run: what it would need."""
    if "--dry-run" in argv:
        from .report.dryrun import dry_run

        return dry_run(argv, parse_run)
    config, out, resume = parse_run(argv)
    from .training.loop import run

    run(config, out=out, resume=resume)
    return 0


def _show(argv: Sequence[str]) -> int:
    """Print a stored tree of a run with values, advantages and stop reasons."""

    def show(
        run: Annotated[Path, tyro.conf.Positional],
        /,
        tree: int | None = None,
        step: int | None = None,
    ) -> Callable[[], None]:
        """Print tree number --tree of a step (the last stored one unless given); without --tree, the list of its trees."""
        from .report.show import show_tree

        return lambda: show_tree(run, tree=tree, step=step)

    _parse(show, "rlzoo show", argv)()
    return 0


def _report(argv: Sequence[str]) -> int:
    """Make one HTML page of runs: rlzoo report RUN... --out report.html. Results, curves, costs and a viewer of sampled trees."""

    def report(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
        /,
        out: Path = Path("report.html"),
        trees: int = 6,
        force: bool = False,
    ) -> Callable[[], None]:
        """Write a page that needs no network to --out, with --trees sampled trees per run (of the first, middle and last step; 0: no
        tree viewer). --force replaces a file that is there."""
        from .report.html import write_report

        def write() -> None:
            made = write_report(runs, out, trees=trees, force=force)
            left = f" (no room for {made.left_out} more)" if made.left_out else ""
            print(f"{made.path}: {made.size_bytes / 1e6:.2f} MB, runs: {len(runs)}, trees: {made.trees}{left}")

        return write

    _parse(report, "rlzoo report", argv)()
    return 0


def parse_eval(argv: Sequence[str]) -> tuple[EvalConfig, Path | None, bool]:
    """Config, --out folder and --resume of an `eval` command line; with --resume, the options of the evaluation to go on with are
    the defaults.

    Raises:
        ValueError: bad folder, option or value.
        SystemExit: --help.
    """
    from .evaluation.options import EvalConfig

    first = argparse.ArgumentParser(prog="rlzoo eval", add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--backend")
    first.add_argument("--out")
    first.add_argument("--resume", action="store_true")
    chosen, flags = _known(first, argv)
    base = EvalConfig()
    if chosen.resume:
        if not chosen.out:
            raise ValueError("--resume needs --out FOLDER, the evaluation to go on with")
        kept = RunFolder.open(chosen.out)
        base = EvalConfig.from_dict(kept.config(), str(kept.path / "config.toml"))
    description = "Also: --out FOLDER  --resume. Or: rlzoo eval --from-outputs FILE... [--json] [--out FOLDER], for recorded outputs"
    config = _parse(EvalConfig, "rlzoo eval", [*_backend_flag(chosen), *flags], default=base, description=description)
    return config, Path(chosen.out) if chosen.out else None, chosen.resume


def _eval(argv: Sequence[str]) -> int:
    """Measure a model: rlzoo eval MODEL --suite NAME. Or grade recorded outputs: rlzoo eval --from-outputs FILE..."""
    if "--from-outputs" in argv:
        first = argparse.ArgumentParser(prog="rlzoo eval", add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--from-outputs", nargs="+", type=Path)
        first.add_argument("--json", action="store_true")
        first.add_argument("--out", type=Path)
        chosen, left = _known(first, argv)
        if left:
            raise ValueError(f"{left[0]!r} does not go with --from-outputs, which takes files, --json and --out FOLDER")
        from .report.evaluated import print_recorded

        print_recorded(chosen.from_outputs, as_json=chosen.json, out=chosen.out)
        return 0
    config, out, resume = parse_eval(argv)
    from .evaluation.job import run_eval

    run_eval(config, out=out, resume=resume)
    return 0


def _compare(argv: Sequence[str]) -> int:
    """Compare arms over seeds and problems: rlzoo compare RUN RUN..., or --arms A,B --seeds N trains what is missing."""

    def compare(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
        /,
        arms: str = "",
        algos: str = "",
        seeds: int = 3,
        match: Literal["tokens", "trained-tokens", "device-hours", "steps"] = "steps",
        budget: float | None = None,
        jobs: int = 1,
        out: Path | None = None,
        common: Path | None = None,
        allow: tuple[str, ...] = (),
        reach: float | None = None,
        json: bool = False,
    ) -> Callable[[], object]:
        """Compare finished runs, grouped into arms by config; or --arms ALGO[@OPTION=VALUE...],FILE.toml,... (--algos: without
        overrides) with --seeds seeds each, ended where they cost the same by --match (--budget; default what the cheapest uses), run
        --jobs at a time below --out (default runs/compare), --common FILE.toml below every arm. --allow names fields of the protocol
        that may differ, --reach a dev Pass@1 (share) whose cost is reported."""
        from .evaluation.compare import compare_arms, compare_runs

        if sum(map(bool, (runs, arms, algos))) != 1:
            raise ValueError("rlzoo compare takes finished runs, or --arms, or --algos: one of the three")
        if runs:
            return lambda: compare_runs(runs, allow=allow, out=out, reach=reach, as_json=json)
        if "@" in algos or ".toml" in algos:
            raise ValueError("--algos takes names of algorithms; overrides and files go to --arms")
        plan: dict[str, Any] = {"seeds": seeds, "match": match, "budget": budget, "jobs": jobs, "common": common}
        place = out or Path("runs/compare")
        return lambda: compare_arms(arms or algos, **plan, out=place, allow=allow, reach=reach, as_json=json)

    _parse(compare, "rlzoo compare", argv)()
    return 0


def _leaderboard(argv: Sequence[str]) -> int:
    """Rank the result rows of a folder: rlzoo leaderboard [--results results]. Writes leaderboard.md and leaderboard.html there."""

    def leaderboard(results: Path = Path("results"), page: Path | None = None) -> Callable[[], None]:
        """Check every row (*.json) below --results and write leaderboard.md and leaderboard.html into it, and its tables of arms
        between the marks of the Markdown page --page."""
        from .report.leaderboard import write_leaderboard

        return lambda: write_leaderboard(results, page)

    _parse(leaderboard, "rlzoo leaderboard", argv)()
    return 0


def _reproduce(argv: Sequence[str]) -> int:
    """Set a paper's published figures beside ours: rlzoo reproduce NAME. Or test its claims on the embedded job: --scale mini."""

    def reproduce(
        paper: Annotated[str, tyro.conf.Positional],
        /,
        scale: Literal["paper", "mini"] = "paper",
        results: Path = Path("results"),
        out: Path | None = None,
    ) -> Callable[[], None]:
        """Print a paper's figures beside those of the rows below --results, or with --scale mini its claims tested on the embedded
        job; --out writes the same as Markdown."""
        from .report.reproduce import print_reproduction

        return lambda: print_reproduction(paper, results, mini=scale == "mini", config_of=recipe_config, out=out)

    _parse(reproduce, "rlzoo reproduce", argv)()
    return 0


def recipe_config(recipe: str) -> dict[str, Any]:
    """The config of a command line without `rlzoo`, of `run` or `eval`, as its row has it.

    Raises:
        ValueError: another verb, or options that it does not know.
    """
    verb, *rest = shlex.split(recipe)
    if verb == "run":
        return parse_run(rest)[0].to_dict()
    if verb == "eval":
        return parse_eval(rest)[0].to_dict()
    raise ValueError(f"{verb!r} makes no result row; known: run, eval")


def _algos(argv: Sequence[str]) -> int:
    """List the algorithms, or print one's card and defaults: rlzoo algos [NAME]."""

    def algos(name: Annotated[str, tyro.conf.Positional] = "", /) -> Callable[[], None]:
        """List the algorithms, or print the card and the defaults of one."""
        from .report.cards import print_algorithms, print_card

        return lambda: print_card(name) if name else print_algorithms()

    _parse(algos, "rlzoo algos", argv)()
    return 0


def _doctor(argv: Sequence[str]) -> int:
    """Check this machine and installation, with what to do about each finding."""

    def doctor() -> Callable[[], int]:
        """Check this machine and installation."""
        from .report.doctor import examine

        return examine

    return int(_parse(doctor, "rlzoo doctor", argv)())


def _tiny(argv: Sequence[str]) -> int:
    """Rebuild the embedded model: rlzoo tiny build --out FOLDER."""
    if not argv or argv[0] != "build":
        raise ValueError("rlzoo tiny knows one thing: rlzoo tiny build --out FOLDER [--seed N] [--steps N] [--threads N]")

    def tiny_build(out: Path, seed: int = 0, steps: int | None = None, threads: int = 2) -> Callable[[], Path]:
        """Train the embedded model and its tokenizer on demonstrations of the embedded task, into the new folder --out; without
        --steps as many as the committed one."""
        from .data.tiny import STEPS
        from .data.tiny import build as build_tiny

        return lambda: build_tiny(out, seed=seed, steps=STEPS if steps is None else steps, threads=threads)

    _parse(tiny_build, "rlzoo tiny build", argv[1:])()
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "eval": _eval,
    "compare": _compare,
    "leaderboard": _leaderboard,
    "reproduce": _reproduce,
    "show": _show,
    "report": _report,
    "algos": _algos,
    "doctor": _doctor,
    "tiny": _tiny,
}


if __name__ == "__main__":
    sys.exit(main())
