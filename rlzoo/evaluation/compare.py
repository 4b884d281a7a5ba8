"""`rlzoo compare`: arms over seeds and problems, at what cost, with one verdict per pair; printed, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import read_toml
from ..escape import visible
from ..report.grid import Grid
from ..report.plots import AXES, curves, frontiers, points
from ..report.text import count, percent
from ..report.text import points as signed
from ..store.cost import spent
from ..store.files import write_aside
from ..store.runs import to_json
from ..training.rates import refuse_embedded_rate
from .arms import TRAINED, Member, as_arm, group, parse_arms, read_member, refuse_mixture
from .comparison import FEW_SEEDS, Arm, Comparison, compare_all
from .curves import Curve, Reach, cost_to_reach, leaders
from .plan import Match, Plan, run_plan
from .stats import Estimate, stratified_mean, t_mean

OVERALL = "overall"
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the cost up to which all arms go, in the table of the frontier
SHORT = 0.98  # of the budget: an arm whose runs ended below was not matched


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """Everything that is told of a comparison. `pass_at_1` by arm, then by set and overall; `costs` by arm, then by kind over seeds;
    `reach` by cost, then by arm; `best` by cost and arm as `report.plots.frontiers`."""

    arms: Mapping[str, Sequence[Member]]
    pass_at_1: Mapping[str, Mapping[str, Estimate]]
    costs: Mapping[str, Mapping[str, Estimate]]
    pairs: Sequence[Comparison]
    reach: Mapping[str, Mapping[str, Reach]]
    best: Mapping[str, Mapping[str, Mapping[str, Any]]]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data: shares, not points; `curves` are those of the report, by arm, data, measure and axis. `frontier`: per cost, from
        which one on which arm has the most for it; each arm's own line is with the arm."""
        found = {cost: self._leaders(cost) for cost in self.best}
        return {
            "arms": {name: self._arm(name) for name in self.arms},
            "pairs": [pair.as_dict() for pair in self.pairs],
            "frontier": {cost: [{"from": x, "pass_at_1": y, "arm": arm} for x, y, arm in points] for cost, points in found.items()},
            "notes": list(self.notes),
        }

    def _arm(self, name: str) -> dict[str, Any]:
        members = self.arms[name]
        drawn = curves([m.run for m in members])
        lines = {d: {m: {a: next(iter(arm.values())) for a, arm in axes.items()} for m, axes in ms.items()} for d, ms in drawn.items()}
        reached = {cost: by_arm[name] for cost, by_arm in self.reach.items() if name in by_arm}
        return {
            "runs": [str(m.run.folder.path) for m in members],
            "seeds": [m.row.seed for m in members],
            "config_sha256": [m.row.arm.config_sha256 for m in members],
            "steps": [m.row.steps for m in members],
            "pass_at_1": {which: e.as_dict() for which, e in self.pass_at_1[name].items()},
            "costs": {kind: e.as_dict() for kind, e in self.costs[name].items()},
            "reach": {cost: {"target": r.target, "costs": list(r.costs), "said": r.sentence(cost)} for cost, r in reached.items()},
            "curves": lines,
            "frontier": {cost: by_arm[name] for cost, by_arm in self.best.items() if name in by_arm},
        }

    def grids(self) -> list[Grid]:
        """Its tables."""
        names = list(next(iter(self.pass_at_1.values())))
        head = ["arm", "seeds", *[f"{name}, % [95 %]" for name in names], "length", "sampled tokens", "trained tokens", "device-hours"]
        rows = []
        for arm, members in self.arms.items():
            length = np.mean([m.row.overall[TRAINED].length.mean for m in members])
            costs = [self.costs[arm][kind].mean for kind in ("tokens", "trained-tokens", "device-hours")]
            told = [f"{length:.1f}", count(costs[0]), count(costs[1]), f"{costs[2]:.4f}"]
            rows.append([arm, str(len(members)), *[percent(self.pass_at_1[arm][name]) for name in names], *told])
        about = "Pass@1: t intervals over training seeds (over problems where there is one seed); costs are means over seeds, of training"
        found = [Grid("Arms", head, rows, [about, *self.notes]), self._differences()]
        return [*found, self._frontier()] if self.best else found

    def _leaders(self, cost: str) -> list[tuple[float, float, str]]:
        return leaders({arm: (own["x"], own["y"]) for arm, own in self.best[cost].items()})

    def _frontier(self) -> Grid:
        rows, notes = (
            [],
            ["the best dev Pass@1 so far, of the mean over seeds, between measurements on straight lines; chance is not told here"],
        )
        for cost, by_arm in self.best.items():
            within = min(own["x"][-1] for own in by_arm.values())
            for share in SHARES:
                shown = [f"{100 * np.interp(share * within, own['x'], own['y']):.1f}" for own in by_arm.values()]
                rows.append([cost, _amount(share * within), *shown])
            notes.append(f"most for its {cost}: " + ", ".join(f"{arm} from {_amount(x)}" for x, _, arm in self._leaders(cost)))
        return Grid("Frontier", ["cost", "at", *(f"{arm}, %" for arm in self.arms)], rows, notes)

    def _differences(self) -> Grid:
        head = ["pair", "set", "difference, points [95 %]", "p", "p after Holm", "detectable, points"]
        rows = []
        for c in self.pairs:
            for name, d, adjusted in [*((n, d, c.adjusted[n]) for n, d in c.sets.items()), (OVERALL, c.overall, c.p_value)]:
                few = min(d.seeds) <= FEW_SEEDS and np.isfinite(d.detectable())
                seen = f"{100 * d.detectable():.1f}" if few else "-"
                rows.append([f"{c.b} - {c.a}", name, signed(d.estimate()), f"{d.p_value():.3g}", f"{adjusted:.3g}", seen])
        notes = ["paired over problems, over seeds and problems; Holm over a pair's sets, for the overall over pairs"]
        notes += [f"{c.verdict}; a run of {c.b} beats one of {c.a} with chance {percent(c.improvement)} %" for c in self.pairs]
        notes += [f"{arm}: dev Pass@1 of {r.sentence(cost)}" for cost, by_arm in self.reach.items() for arm, r in by_arm.items()]
        return Grid("Differences", head, rows, notes, names=2)

    def markdown(self) -> str:
        """The page."""
        return "# Comparison\n\n" + "\n".join(grid.markdown() for grid in self.grids())


def _amount(cost: float) -> str:
    return f"{cost:.3g}" if cost < 100 else count(cost)


def compare_members(
    arms: Mapping[str, Sequence[Member]], *, allow: Sequence[str] = (), reach: float | None = None, notes: Sequence[str] = ()
) -> Compared:
    """Compare arms of finished runs. `reach` is the dev Pass@1 (share) whose cost is told; by default the lowest last one of an arm.

    Raises:
        ValueError: they cannot be compared, see `refuse_mixture` and `comparison.compare`.
    """
    notes = [*notes, *refuse_mixture(arms, allow)]
    weights = next(iter(arms.values()))[0].row.overall[TRAINED].weights
    scored = [as_arm(name, [m.row for m in members]) for name, members in arms.items()]
    costs = {name: [spent(m.run.rows) for m in members] for name, members in arms.items()}
    kinds = ("tokens", "trained-tokens", "device-hours")
    return Compared(
        arms,
        {arm.name: _pass_at_1(arm, weights) for arm in scored},
        {name: {kind: t_mean([c[kind] for c in own], floor=0.0) for kind in kinds} for name, own in costs.items()},
        compare_all(scored, weights=weights),
        _reach(arms, reach),
        _best(arms),
        notes,
    )


def _pass_at_1(arm: Arm, weights: Mapping[str, float]) -> dict[str, Estimate]:
    def over(names: Sequence[str]) -> Estimate:
        share = [weights[name] for name in names]
        if len(arm.seeds) == 1:
            return stratified_mean([arm.scores[name][0] for name in names], share)
        runs = np.average([np.nanmean(arm.scores[name], axis=1) for name in names], axis=0, weights=share)
        return replace(t_mean(runs, floor=0.0, ceiling=1.0), method="t over seeds")

    return {name: over([name]) for name in arm.scores} | {OVERALL: over(list(arm.scores))}


def _reach(arms: Mapping[str, Sequence[Member]], target: float | None) -> dict[str, dict[str, Reach]]:
    lines = {name: [[points(m.run.rows, "dev/pass_at_1", axis) for m in own] for axis in AXES.values()] for name, own in arms.items()}
    if not all(len(x) for axes in lines.values() for runs in axes for x, _ in runs):
        return {}  # a run without dev measurements has no curve
    if target is None:
        target = min(float(np.mean([y[-1] for _, y in axes[0]])) for axes in lines.values())
    return {
        unit: {name: cost_to_reach([Curve.of(x, y) for x, y in axes[i]], target) for name, axes in lines.items()}
        for i, unit in enumerate(AXES)
    }


def _best(arms: Mapping[str, Sequence[Member]]) -> dict[str, dict[str, Any]]:
    own = {name: frontiers([m.run for m in members]) for name, members in arms.items()}
    found = {cost: {name: by_arm[arm] for name, axes in own.items() for by_arm in [axes[cost]] for arm in by_arm} for cost in AXES}
    return found if all(len(by_arm) == len(arms) for by_arm in found.values()) else {}  # a run without dev measurements has none


def compare_runs(
    runs: Sequence[Path], *, allow: Sequence[str] = (), out: Path | None = None, reach: float | None = None, as_json: bool = False
) -> Compared:
    """`rlzoo compare RUN RUN ...`: print, and write into `out` if given.

    Raises:
        ValueError: see `arms.group` and `compare_members`.
    """
    return _tell(compare_members(group(runs), allow=allow, reach=reach), out, as_json)


def compare_arms(
    arms: str,
    *,
    seeds: int,
    match: Match,
    budget: float | None,
    jobs: int,
    out: Path,
    common: Path | None = None,
    allow: Sequence[str] = (),
    reach: float | None = None,
    as_json: bool = False,
) -> Compared:
    """`rlzoo compare --arms ...`: run what is missing below `out`, compare, write `compare.md` and `compare.json` there, and print.

    Raises:
        ValueError: see `parse_arms`, `refuse_embedded_rate`, `run_plan` and `compare_members`.
        RuntimeError: a run failed.
    """
    layers = [] if common is None else [(str(common), read_toml(common))]
    plan = Plan(parse_arms(arms, layers), seeds, out, match, budget, jobs)
    for config in plan.arms.values():  # in the cells' files every option is given
        refuse_embedded_rate(config)
    done, used = run_plan(plan)
    members = {name: [read_member(path) for path in paths] for name, paths in done.items()}
    notes = [f"matched by {match}: every run ends at the step that reaches {used:g}"]
    if match == "device-hours" and jobs > 1:
        notes.append("one run at a time, as device-hours are matched")
    for name, own in members.items():
        least = min(spent(m.run.rows)[match] for m in own)
        if least < SHORT * used:
            notes.append(f"not matched: a run of {name} ended its steps at {least:g}; give the arm more steps ({name}@steps=N)")
    return _tell(compare_members(members, allow=allow, reach=reach, notes=notes), out, as_json)


def _tell(compared: Compared, out: Path | None, as_json: bool) -> Compared:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_aside(out / "compare.json", to_json(compared.as_dict(), indent=1) + "\n")
        write_aside(out / "compare.md", compared.markdown())
    if as_json:
        print(json.dumps(json.loads(to_json(compared.as_dict()))))
    else:
        for grid in compared.grids():
            grid.print()
        if out is not None:
            print(visible(f"written: {out / 'compare.md'} and {out / 'compare.json'}"))
    return compared


__all__ = ["Compared", "compare_arms", "compare_members", "compare_runs"]
