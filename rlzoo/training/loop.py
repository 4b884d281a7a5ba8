"""The training loop: prompts -> trees -> rewards -> credit -> packed batch -> update -> rows. It names no algorithm."""

from __future__ import annotations

import copy
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..backends.drawing import known_vocabulary
from ..backends.memory import free
from ..backends.select import choose, open_backend
from ..config import RunConfig, build
from ..credit.base import Credit
from ..credit.whitening import unwhitened, whiten_trained
from ..data.loading import load_problems
from ..data.problems import Problem, checksum
from ..data.stream import ProblemStream
from ..data.templates import fitting, turn_ends
from ..errors import one_line
from ..escape import visible
from ..evaluation.rows import result_row
from ..evaluation.testsets import answers_checksum
from ..losses.correction import MismatchError
from ..report.progress import Progress
from ..report.tables import Cost, FinalTable, final_table, print_table
from ..report.text import beside
from ..rewards.reward import open_reward
from ..sampling.seeds import mix
from ..store.cost import open_ledger, spent
from ..store.environment import environment
from ..store.files import locked, taken_back
from ..store.runs import RunFolder
from ..store.trackers import check_trackers, open_trackers
from ..store.trees import write_trees
from ..tree import Float32
from . import checkpoint
from .collect import Batch, Collector, describe
from .dropout import switch_off_dropout
from .exactness import exactness
from .fitting import recomputes
from .forward import recompute_layers
from .interrupts import Interrupts
from .measure import Measurer, final_suite
from .models import LoadedModel, load_model, pick_device, weights_sha256
from .opening import prove_opening
from .optim import make_optimizer
from .rates import refuse_embedded_rate
from .retry import TokenBudget
from .sync import Sync
from .update import NonFiniteError, credited, score, update


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: its folder and its result row (also in summary.json)."""

    folder: Path
    summary: dict[str, Any]


def run(config: RunConfig, *, out: Path | None = None, resume: bool = False) -> Run:
    """Train as configured, measure, and leave a run folder; or go on with the run in `out` as if it had never been interrupted.

    Raises:
        ValueError: bad input, found before anything slow starts; another process works in the folder; or a run is to be resumed
            with another config than its own.
        RuntimeError: training could not go on (non-finite loss, grading failed, disk full, ...); the last checkpoint is usable.
        KeyboardInterrupt: by Ctrl-C or SIGTERM; says how to go on.
    """
    check_trackers(config.trackers)
    name = f"{config.algo}-s{config.seed}"
    path = RunFolder.place(out, name, config.to_dict(), resume=resume, whole=lambda kept, origin: build([(origin, kept)]).to_dict())
    if resume and (summary := RunFolder(path).summary()) is not None:
        return _finished(path, summary)
    choose(config.backend, pick_device(config.backend.device))
    refuse_embedded_rate(config)
    problems = load_problems(config.problems)
    dev = load_problems(config.evaluation.dev, limit=config.evaluation.dev_problems) if config.evaluation.every else []
    suite = final_suite(config)
    again = f"rlzoo run --resume --out {shlex.quote(str(path))}"
    with Interrupts() as interrupts, locked(path) as made, taken_back(path, made) as stays:
        if resume:
            stays()
        folder = RunFolder(path) if resume else RunFolder.create(path, config.to_dict())
        try:
            torch.set_num_threads(config.backend.threads or os.cpu_count() or 1)
            loaded = load_model(config.model, dtype=config.master_dtype, device=config.backend.device)
            trainer = Trainer(config, folder, loaded, problems, dev, suite, resume=resume)
            stays()  # until here nothing has happened, and what is there would block the corrected command
            try:
                with closing(trainer):
                    trainer.train(interrupts)
                    return Run(path, trainer.finish())
            except (OSError, ValueError, RuntimeError) as error:
                said = one_line(error)
                where = "" if said.startswith("step ") else f"after step {trainer.step}: "
                raise RuntimeError(f"{where}{said}; once that is mended, go on with {again}") from error
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"interrupted; to go on: {again}") from error


def _finished(path: Path, summary: dict[str, Any]) -> Run:
    if "table" in summary:
        print_table(FinalTable.from_dict(summary["table"]))
    print(f"run folder: {visible(str(path))}, finished already: nothing is left to do")
    return Run(path, summary)


class Trainer:
    """The state of a run and one method per stage."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        loaded: LoadedModel,
        problems: Sequence[Problem],
        dev: Sequence[Problem],
        suite: Mapping[str, Sequence[Problem]],
        *,
        resume: bool = False,
    ) -> None:
        self.config, self.folder, self.loaded = config, folder, loaded
        self.algorithm = config.algorithm
        self.ledger = open_ledger(loaded.device)
        self.model = loaded.model
        self.step = 0
        self.best: dict[str, float] = {}
        self.sampled_tokens = 0
        self.optimizer = make_optimizer(self.model, self.algorithm.optim)
        self.updates = 0  # taken since the start of this process
        self.optimizer.register_step_post_hook(self._count_update)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if "ref_logprobs" in self.algorithm.loss.needs else None
        ends = turn_ends(config.template, loaded.tokenizer)
        self.backend = open_backend(config.backend, self.model, loaded.tokenizer, loaded.device, ends)
        prove_opening(self.backend, self.model, config.backend.dtype)
        self.progress = Progress(max(1, self.algorithm.schedule.steps))
        for said in (switch_off_dropout(self.model), config.correction.told(config.corrections)):
            if said:
                self.progress.note(said)
        self.reward = open_reward(config.reward)
        self.ledger.beside("grading_cpu_s", lambda: self.reward.cpu_s)
        problems, longest = self._fitting(problems, "training", self.algorithm.sampler.max_response_tokens, config.max_prompt_tokens)
        self.stream = ProblemStream(problems, seed=config.seed)
        self.collector = Collector(
            self.algorithm, self.backend, self.reward, self.stream, template=config.template, seed=config.seed, ledger=self.ledger
        )
        self.dev, _ = self._fitting(dev, "dev", config.evaluation.max_response_tokens, config.max_prompt_tokens)
        self.sync = Sync(self.backend, self.collector.probes(), config.backend.dtype, config.seed)
        self.measurer = Measurer(config, suite, self.backend, self.sync, self.reward, self.ledger, folder, self.progress)
        for name, testset in suite.items():
            self._fitting(testset, name, config.evaluation.max_response_tokens, 0)
        self.layout = self._layout(longest)
        if recomputes(config, self.model, longest):  # after the engine and the reference were copied
            recompute_layers(self.model)
            self.progress.note("updates compute each layer's activations twice instead of keeping them (gradient checkpointing)")
        self.token_budget = TokenBudget(config.update.token_budget, self.progress.note)
        restored = resume and self._restore()
        self.trackers = open_trackers(config.trackers, folder.path, config.to_dict(), after=self.step if restored else None)

    def _count_update(self, *_: object) -> None:
        self.updates += 1

    def _rate(self, update: int) -> float:
        """The learning rate of a step's update number `update`. It goes by the run's steps, not by the updates that happened: steps
        that train nothing stretch neither warm-up nor decay."""
        schedule = self.algorithm.schedule
        per_step = schedule.mini_batches * schedule.epochs
        return self.algorithm.optim.rate(self.step * per_step + update, schedule.steps * per_step)

    def _fitting(self, problems: Sequence[Problem], what: str, response_tokens: int, at_most: int) -> tuple[list[Problem], int]:
        """The problems whose prompts are not longer than `at_most` (0: all), and the tokens of the longest prompt and response.

        Raises:
            ValueError: see `fitting`.
        """
        room = self.backend.max_context - response_tokens
        kept, longest = fitting(problems, self.config.template, self.backend.tokenizer, room=room, at_most=at_most)
        if len(kept) < len(problems):
            self.progress.note(f"{len(problems) - len(kept)} of {len(problems)} {what} problems left out: prompts over {at_most} tokens")
        return kept, longest + response_tokens

    def _checksums(self) -> list[str]:
        """What tells the training problems and their answers from others."""
        return [checksum(self.stream.problems), answers_checksum(self.stream.problems)]

    def _layout(self, longest_path: int) -> str:
        reason = exactness(self.model, longest_path) if self.config.update.layout == "packed" else None
        if reason:
            self.progress.note(f"updates use one row per response: packing is not exact here ({reason})")
        return "unrolled" if reason else self.config.update.layout

    def _restore(self) -> bool:
        """Go back to the newest whole checkpoint, or to the start if there is none (False).

        Raises:
            ValueError: the checkpoint is of another model, or was made with other training problems.
        """
        saved = checkpoint.newest(self.folder.checkpoints, self.model, self.progress.note)
        if saved is not None and saved.state["problems"] != self._checksums():
            raise ValueError(
                f"the problems of {self.config.problems} are not those that {self.folder.path} was begun with; "
                "bring them back or begin anew"
            )
        self.folder.rewind(None if saved is None else saved.step)
        if saved is None:
            return False
        saved.apply(self.model, self.optimizer)
        state = saved.state
        self.step, self.best, self.stream.cursor = saved.step, state["best"], state["cursor"]
        self.sampled_tokens, self.token_budget.tokens = state["sampled_tokens"], state["token_budget"]
        self.ledger.resume(state["ledger"])
        self.sync(self.model, self.step)
        return True

    def train(self, interrupts: Interrupts) -> None:
        """All remaining steps, with dev evaluations and checkpoints.

        Raises:
            RuntimeError: see `run`.
            KeyboardInterrupt: by a signal; the step that it came in is finished and saved.
        """
        options = self.config.evaluation
        if self.step == 0 and self.dev:
            self._log(self._measure_dev())
        while not self._over({}):
            with interrupts.held(f"step {self.step + 1}"):
                row = self._guarded_step()
                last = self._over(row)
                improved = False
                if self.dev and (last or self.step % options.every == 0):
                    row |= self._measure_dev()
                    improved = row["dev/pass_at_1"] > self.best.get("pass_at_1", -1.0)
                    if improved:
                        self.best = {"step": self.step, "pass_at_1": row["dev/pass_at_1"]}
                self._log(row)
                due = self.config.checkpoints.every and self.step % self.config.checkpoints.every == 0
                if improved or due or last or interrupts.asked:
                    self._save()

    def _over(self, row: Mapping[str, float]) -> bool:
        """Whether training ends here: all steps are done, or the budget is spent; `row` is the step's, where it is not logged yet."""
        schedule = self.algorithm.schedule
        if self.step >= schedule.steps or schedule.limit == "none":
            return self.step >= schedule.steps
        return spent([*self.folder.metrics(), row])[schedule.limit] >= schedule.budget

    def _guarded_step(self) -> dict[str, float]:
        """A step. If its first update is refused (not finite, or sampler and trainer too far apart), nothing of it has been applied,
        and the state before it is saved before the run ends; if a later one is, the last regular checkpoint is the newest state
        that a run can go on from."""
        cursor, updates = self.stream.cursor, self.updates
        try:
            return self._one_step()
        except (NonFiniteError, MismatchError) as error:
            if self.step > 0 and self.updates == updates:
                self.stream.cursor = cursor
                self._save()
            found = checkpoint.steps(self.folder.checkpoints)
            where = f"the newest checkpoint is step {found[-1]} in {self.folder.checkpoints}" if found else "there is no checkpoint yet"
            raise type(error)(f"step {self.step + 1}: {error}; {where}") from error

    def _one_step(self) -> dict[str, float]:
        started, before = time.perf_counter(), self.ledger.seconds()
        set_seed(mix(self.config.seed, self.step, "global") % 2**32)  # whatever draws from a global generator is resumable too
        batch = self.collector.collect(self.step)
        row = describe(batch)
        with self.ledger.phase("credit"):
            trees = [g.tree for g in batch.kept]
            credits = self.algorithm.filter.mask(trees, unwhitened(self.algorithm.credit)(trees))
        used = [i for i, c in enumerate(credits) if len(c.row)]
        row["trained_trees"] = len(used)
        if used:
            metrics, trained = self._update([trees[i] for i in used], [credits[i] for i in used])
            row |= metrics
            for i, credit in zip(used, trained, strict=True):
                credits[i] = credit
        else:
            self.progress.note(f"step {self.step + 1}: no tree carries a signal (all right, all wrong or ungraded); weights stay")
        self.step += 1
        self._store(batch, credits)
        self.sampled_tokens += int(row["sampled_tokens"])
        spent = {name: seconds - before[name] for name, seconds in self.ledger.seconds().items()}
        row |= {f"seconds/{name}": round(s, 4) for name, s in spent.items() if s > 0}
        row["tokens_per_s"] = row["unrolled_tokens"] / max(spent["sampling"], 1e-9)
        row["unique_tokens_per_s"] = row["sampled_tokens"] / max(spent["sampling"], 1e-9)
        row["total_sampled_tokens"] = self.sampled_tokens
        row["device_hours"] = self.ledger.device_hours
        row["step_s"] = time.perf_counter() - started
        return row

    def _update(self, trees: list[Any], credits: Sequence[Credit]) -> tuple[dict[str, float], Sequence[Credit]]:
        """Update and sync; metrics, and the credits as they were trained on: after every mask, whitened over what is left."""
        trained = credits

        def finish(left: Sequence[Credit], old: Sequence[Float32]) -> Sequence[Credit]:
            nonlocal trained
            whitens = unwhitened(self.algorithm.credit) is not self.algorithm.credit
            trained = whiten_trained(trees, left, old) if whitens else left
            return trained

        computation: dict[str, Any] = {
            "temperature": self.algorithm.sampler.sampling.temperature,
            **known_vocabulary(self.backend.tokenizer)._asdict(),
            "token_budget": self.token_budget,
            "layout": self.layout,
            "autocast_dtype": torch.bfloat16 if self.config.trainer_dtype == "bfloat16" else None,
        }
        self.backend.rest()
        if self.reference is not None:
            with self.ledger.phase("scoring"):
                scores = score(self.reference, trees, only=credited(trees, credits), **computation)
                trees = [replace(t, ref_logprobs=s) for t, s in zip(trees, scores, strict=True)]
        with self.ledger.phase("update"):
            metrics = update(
                self.model,
                self.optimizer,
                trees,
                credits,
                self.algorithm.loss,
                rate=self._rate,
                finish=finish,
                max_grad_norm=self.algorithm.optim.max_grad_norm,
                mini_batches=self.algorithm.schedule.mini_batches,
                epochs=self.algorithm.schedule.epochs,
                correction=self.config.corrections,
                max_mismatch_kl=self.config.max_mismatch_kl,
                **computation,
            )
        with self.ledger.phase("sync"):
            proof = self.sync(self.model, self.step + 1)
        row = {name if "/" in name else f"update/{name}": value for name, value in metrics.items()}
        return row | {"sync/probe_gap": proof.largest, "sync/probe_mean": proof.mean}, trained

    def _store(self, batch: Batch, credits: Sequence[Credit]) -> None:
        given: list[Credit | None] = [*credits, *(None for _ in batch.dropped)]
        write_trees(self.folder.trees_path(self.step), [g.tree for g in batch.all], given, [g.record() for g in batch.all])

    def _measure_dev(self) -> dict[str, float]:
        result = self.measurer.dev(self.dev, step=self.step)
        return {f"dev/{name}": value for name, value in result.items()}

    def _log(self, row: dict[str, float]) -> None:
        row = {"step": self.step, **row}
        self.folder.log(row)
        self.trackers.log(row, self.step)
        self.progress.update(row)

    def _save(self) -> None:
        with self.ledger.phase("checkpoint"):
            state = {
                "cursor": self.stream.cursor,
                "problems": self._checksums(),
                "best": self.best,
                "sampled_tokens": self.sampled_tokens,
                "token_budget": self.token_budget.tokens,
                "ledger": self.ledger.as_dict(),
            }
            checkpoint.save(self.folder.checkpoints, self.step, self.model, self.loaded.tokenizer, self.optimizer, state)
            keep = {int(self.best["step"])} if self.best else set()
            checkpoint.prune(self.folder.checkpoints, last=self.config.checkpoints.last, keep=keep, upto=self.step)

    def finish(self) -> dict[str, Any]:
        """Write `final/`, measure base and trained model on the suite, write summary.json, print the table; returns the row."""
        with self.ledger.phase("checkpoint"):
            checkpoint.save_model(self.folder.final, self.model, self.loaded.tokenizer)
        training = self.ledger.as_dict()
        self.progress.close()
        self.optimizer.state.clear()  # the weights are saved, nothing is trained any more
        self.reference = None
        free()
        results, described = self.measurer.final(self.model), self.measurer.described()
        summary = result_row(
            kind="run",
            arm=self.config.algo,
            config=self.config.to_dict(),
            results=results,
            ledger=self.ledger.as_dict(),
            environment=environment(),
            **described,
        ) | {
            "algo": self.config.algo,
            "steps": self.step,
            "sampled_tokens": self.sampled_tokens,
            "unrolled_tokens": int(sum(row.get("unrolled_tokens", 0) for row in self.folder.metrics())),
            "best": self.best,
            "training": training,
            "weights_sha256": {"base": weights_sha256(self.config.model), "trained": weights_sha256(str(self.folder.final))},
        }
        table = None
        if results:
            cost = Cost(self.sampled_tokens, training["device_hours"])
            told = {"weights": described["weights"], "device": self.ledger.device, "notes": beside(training)}
            table = final_table(results["base"], results["trained"], cost, **told)
            summary["table"] = table.as_dict()
        self.folder.write_summary(summary)
        if table is not None:
            print_table(table)
        print(f"run folder: {visible(str(self.folder.path))}")
        return summary

    def close(self) -> None:
        """End workers and trackers; idempotent."""
        self.progress.close()
        self.reward.close()
        self.trackers.close()
        self.backend.close()


__all__ = ["Run", "Trainer", "run"]
