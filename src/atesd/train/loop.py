"""The loop: what happens in a step, in order. How each phase works stands in the file named after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

from atesd.config import RunConfig
from atesd.evaluate.runner import evaluate
from atesd.files import dump_json
from atesd.routing.route import Route
from atesd.runlog import Phases, ReadRunDir, RunDir
from atesd.sections import TrackConfig
from atesd.seeds import derive_seed
from atesd.train.ahead import Ahead, lag_of, ratio_metrics
from atesd.train.asked import drawn, proposed, reported, routed, state_of, wanted
from atesd.train.batch import Row
from atesd.train.card import model_card
from atesd.train.checkpoint import (
    kept_best,
    load_optimizer,
    load_teacher,
    load_weights,
    restore_interrupted,
    save_checkpoint,
    save_model,
)
from atesd.train.hub import commit_of
from atesd.train.measure import logged
from atesd.train.memory import within_memory
from atesd.train.model import decide_dtype, resolve
from atesd.train.record import batch_metrics, grader_metrics, group_rows, pass_rates, rollout_rows, timings
from atesd.train.resume import (
    as_it_began,
    digests_of_code,
    newest_whole,
    open_for_resume,
    refuse_other_parts,
    resumed_config,
    warn_of_code,
    warn_of_processes,
)
from atesd.train.setup import Parts, assemble, for_evaluation
from atesd.train.share import decide_shard, refuse_unseen
from atesd.train.stats import StepOutcome
from atesd.train.stop import Stop
from atesd.train.teacher import trained_tensors
from atesd.train.track import Trackers, refuse_missing
from atesd.train.world import World, fingerprint
from atesd.types import Group, Measurement, Observation, Problem, UserError

Listener = Callable[[dict[str, Any]], None]


def classes_of(parts: Any) -> dict[str, str]:
    """Return which class each policy is of."""
    kinds = {name: type(policy) for name, policy in parts.policies.items()}
    return {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in kinds.items()}


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop; its state after `step` steps is saved."""

    def __init__(self, step: int, run: Path) -> None:
        super().__init__(f"stopped after step {step}; continue with: atesd train --resume {run}")
        self.step = step
        self.run = run


class Trainer:
    """One run in one directory: `Trainer.start(...)` or `Trainer.resume(...)`, then `train()`."""

    def __init__(self, config: RunConfig, run: RunDir, parts: Parts, listener: Listener | None = None) -> None:
        self.config = config
        self.run = run
        self.parts = parts
        self.world = World.join()
        self.step = 0
        self.listener = listener
        self._phases = Phases()
        self._ahead = Ahead()
        self._seconds = 0.0
        self._best: dict[str, float] | None = None
        self._latest_eval: dict[str, float] = {}
        self._stop = Stop()
        self._has_ended = False
        self._trackers = Trackers(config.track if self.world.is_main else TrackConfig(), run.path)
        self.report: Callable[[Path], Path] | None = None
        """Writes the report of a run's directory, for trackers that keep files; unset, they get none."""

    @classmethod
    def start(
        cls,
        config: RunConfig,
        out: Path,
        *,
        listener: Listener | None = None,
        say: Callable[[str], object] | None = None,
        before: Callable[[RunConfig], None] | None = None,
    ) -> Trainer:
        """Begin a run in a new directory. UserError if the directory holds anything, or the parts do not fit.

        `say` gets a line about what the recipe leaves to the machine; config.json holds what came of it. `before` sees
        the recipe as it will be run, before anything that it names is loaded.
        The directory is made last, so that a start that fails leaves nothing behind.
        """
        world = World.join()
        directory = RunDir if world.is_main else ReadRunDir
        with world.sound():
            directory.check_free(out)
            world.barrier()
            refuse_missing(config.track)
            config = decide_shard(config)
            model = world.agreed(decide_dtype(config, say).model)  # "auto" looks at what is fast here
            config = config.model_copy(update={"model": model})
            if before is not None:
                before(config)
            with within_memory(config, "loading the model"):
                parts = assemble(config)
            path = config.rollout.engine.path(parts.model, config.rollout.max_new_tokens)
            if say is not None and path:
                say(f"completions are sampled by {path}")
            if say is not None and config.model.compile:
                say("decoder layers are compiled in their first passes, which may take a minute")
            first = [measurement.kind for policy in parts.policies.values() for measurement in wanted(policy, 0)]
            parts.measurer.check(dict.fromkeys(first))
            world.barrier()
            env = {"sampling": path, "processes": world.size, "code": digests_of_code(config)}
            commit = commit_of(resolve(config.model.path), config.model.revision)
            env |= {} if commit is None else {"model_commit": commit}
            run = directory.create(out, config.model_dump(mode="json"), config.about(), env)
            if parts.shards.is_sharded:
                refuse_unseen(out, world)
            return cls(config, run, parts, listener)

    @classmethod
    def resume(
        cls,
        out: Path,
        overrides: Sequence[str] = (),
        *,
        listener: Listener | None = None,
        before: Callable[[RunConfig], None] | None = None,
        prepare: Callable[[Parts], None] | None = None,
    ) -> Trainer:
        """Continue a run from its newest whole checkpoint; from the beginning where it has none.

        `overrides` may ask for more steps, or change what is saved and how much memory is used (`train/resume.py`).
        `before` sees the recipe before anything that it names is loaded or run. `prepare` puts parts of your own in
        place before their state is restored, as you did after `start`.

        UserError for what cannot be believed, or continued exactly: damage, an edited recipe, another version's run.
        """
        world = World.join()
        with world.sound():
            with world.in_turn():
                run = open_for_resume(out, RunDir if world.is_main else ReadRunDir)
                for name in ("best", "final"):
                    restore_interrupted(out / name)
                found = newest_whole(run)
                resumed = resumed_config(run, found[1]["config"] if found else None, overrides)
            world.refuse_difference(
                f"found different checkpoints of {out} to go on from",
                found[0].name if found else "",
                "all machines must see the run directory under the same path, and as it is now",
            )
            config = resumed.config
            if decide_shard(config) != config:
                raise UserError(
                    f"accelerate was launched with --use_fsdp, but {out} was begun without sharded weights "
                    "(model.shard = false) and cannot change it under way: launch without it"
                )
            began = as_it_began(config, run)
            if before is not None:
                before(began)
            refuse_missing(config.track)
            with within_memory(config, "loading the model"):
                parts = assemble(began)
            if prepare is not None:
                prepare(parts)
            trainer = cls(config, run, parts, listener)
            if found:
                trainer._restore(*found)
            else:
                refuse_other_parts(run.path, classes_of(parts), run.env().get("parts", {}))
            warn_of_code(run, config)
            resumed.keep(run)
            world.barrier()  # else one of the others might still read the result that is gone, and be done
            return trainer

    def train(self) -> dict[str, Any]:
        """Run to the end and return what `result.json` holds. Interrupted after a signal or `stop`, state saved.

        UserError where this trainer's run has ended before its last step: it is no longer the only writer.
        """
        done = self.run.result()
        if done is not None and self.step >= self.config.step.num_steps:
            self.run.unlock()
            return done
        if self._has_ended:
            raise UserError(f"this trainer ended at step {self.step}: Trainer.resume({str(self.run.path)!r}) goes on")
        self._has_ended = True
        try:
            self.parts.refuse_unheard()
            self._states()  # now, rather than at the first checkpoint
            with self._stop.on_signals(self.world), self.world.sound(Interrupted):
                self._trackers.start(self.config.model_dump(mode="json"), self.step)
                if self.step == 0:
                    self._begin()
                while self.step < self.config.step.num_steps:
                    self._one_step()
                    if self.world.any(self._stop.asked) and self.step < self.config.step.num_steps:
                        if not self._due(self.config.save.every):
                            self._save()
                        raise Interrupted(self.step, self.run.path)
                return self._finish()
        finally:
            self._ahead.drop()
            self._trackers.finish()
            self.run.unlock()

    def stop(self) -> None:
        """Have the run end after its present step, as a signal does, from a listener or another thread.

        Of several processes one is enough.
        """
        self._stop.asked = True

    def _begin(self) -> None:
        """Measure and evaluate the untrained student: l_0, and the start of every curve."""
        clock = perf_counter()
        self.run.rewind(-1, {})
        self.run.remember(parts=classes_of(self.parts))
        metrics = {"task/dropped": float(len(self.parts.dropped))} | self._observe({}) | self._evaluate()
        self._seconds += perf_counter() - clock
        self._log(metrics | self._phases.take())

    def _one_step(self) -> None:
        """Sample, grade, route, show the hint, update, measure."""
        clock = perf_counter()
        parts, config, phase = self.parts, self.config, self._phases.phase
        with phase("sample"), within_memory(config, "sampling"):
            groups = self._groups()
        problems, ahead_s = [group.problem for group in groups], self._ahead.seconds()
        lag = lag_of(groups, self.step) if config.rollout.ahead else 0.0
        with phase("exposure"):
            ratios = proposed(parts.controller, self.step, problems, pass_rates(groups))
        with phase("rows"):
            routes = routed(parts.router, self.step, groups, max(ratios), config.routing)
            target = config.target.at(parts.strength.at(max(ratios), capped=parts.router.capped))
            parts.credit.remember(groups, routes, ratios, target)
            rows = parts.rows.build(groups, routes, ratios, target.views, trains=True)
        references = self._reference_metrics(problems)
        with phase("update"), within_memory(config, "updating"):
            outcome = parts.stepper.optimize(rows, target, is_on_policy=not lag)
        self.step += 1
        parts.sync(self.step)
        metrics = outcome.metrics | references | batch_metrics(groups, routes, rows, parts.task.traits)
        metrics |= self.world.total(grader_metrics(parts.driver.reward))
        scaled = config.rl.teacher_credit is not None and "rl/credit" in outcome.metrics
        idle = "loss/distil" not in outcome.metrics and not scaled
        metrics |= {"route/idle": float(idle), "route/paused": float(idle and not config.routing.reads_exposure)}
        if config.rollout.ahead:
            metrics |= {"rollout/lag": lag} | ratio_metrics(rows, outcome.rows, config)
        if self._due(config.save.rollouts_every):
            self._write_rollouts(groups, routes, rows, outcome)
        metrics |= self._observe(metrics)
        if self._due(config.eval.every):
            metrics |= self._evaluate()
        self.run.log_groups(self.step, group_rows(groups, routes, rows, target.strength))
        self._seconds += perf_counter() - clock
        self._log(metrics | timings(self._phases.take() | ahead_s, perf_counter() - clock, metrics["optim/tokens"]))
        if self._due(config.save.every):
            self._save()

    def _write_rollouts(
        self, groups: Sequence[Group], routes: Sequence[Route], rows: Sequence[Row], outcome: StepOutcome
    ) -> None:
        """Keep completions with what their teacher read, before a policy learns from them."""
        parts, count = self.parts, self.config.save.rollouts
        shown = rollout_rows(
            groups, routes, rows, outcome, step=self.step, renderer=parts.renderer, count=count, reached=parts.reached
        )
        self.run.write_rows("rollouts", self.step, shown)

    def _groups(self) -> list[Group]:
        """Return the groups of this step; where the recipe says so, have those of the next one sampled meanwhile."""
        config, driver, every = self.config, self.parts.driver, self.parts.problems
        groups = self._ahead.take(every) if self._ahead else self._rollout([every[place] for place in self._drawn()])
        if config.rollout.ahead and self.step + 1 < config.step.num_steps:
            chosen = self._drawn()
            seed = derive_seed(config.seed, "sample", self.step + 1)
            self._ahead.begin(chosen, driver.ahead([every[place] for place in chosen], config.rollout, seed=seed))
        return groups

    def _drawn(self) -> list[int]:
        parts = self.parts
        return drawn(parts.curriculum, self.step, self.config.step.problems, len(parts.problems))

    def _rollout(self, problems: list[Problem]) -> list[Group]:
        """Sample from the student, or take the references where the router trains on them."""
        if self.config.routing.source == "reference":
            return self.parts.driver.reference(problems, self.config.rollout.max_new_tokens)
        seed = derive_seed(self.config.seed, "sample", self.step)
        return self.parts.driver.rollout(problems, self.config.rollout, seed=seed)

    def _observe(self, stats: dict[str, float]) -> dict[str, float]:
        """Take the wanted measurements of theta_step, hand them round, and return what there is to log."""
        policies = self.parts.policies.values()
        asked = [measurement for policy in policies for measurement in wanted(policy, self.step)]
        if self.config.probe.log_every and self.step % self.config.probe.log_every == 0:
            asked.append(Measurement("probe_nll"))
        measured = self.parts.measurer.measure(asked, self._phases)
        stats, measured = self.world.agreed((stats, measured))
        metrics = logged(measured)
        with self._phases.phase("exposure"):
            for policy in policies:
                policy.observe(Observation(self.step, stats, measured))
                metrics |= reported(policy, self.step, stats)
        return metrics

    def _reference_metrics(self, problems: Sequence[Problem]) -> dict[str, float]:
        """Score the references of the step's problems before the update, where the recipe asks for it."""
        if not self.config.probe.log_references:
            return {}
        with self._phases.phase("probe"):
            scores = self.parts.probe.nll_of(problems)
        return {"curriculum/reference_nll": sum(scores.values()) / len(scores)}

    def _evaluate(self) -> dict[str, float]:
        """Evaluate on held-out problems; keep the best model so far."""
        config, parts = self.config, self.parts
        with self._phases.phase("eval"), within_memory(config, "evaluating"):
            result = evaluate(
                parts.task.name,
                parts.eval_problems,
                for_evaluation(parts.driver, config),
                config.eval.sampling(config.rollout),
                seed=derive_seed(config.seed, "eval", self.step),
                traits=parts.task.traits,
            )
        self.run.write_rows("eval", self.step, result.rows)
        self._latest_eval = result.metrics
        score = result.metrics.get(f"eval/{parts.task.name}/avg@{config.eval.k}")
        if score is not None:
            self._keep_best(score)
        return result.metrics

    def _keep_best(self, score: float) -> None:
        """Keep the model as it is now if none was as good; its manifest says of which step it is, and its score."""
        if self._best is None or score > self._best["score"]:
            self._best = {"step": self.step, "score": score}
            self._write_model("best", self._best)

    def _write_model(self, name: str, about: Mapping[str, float] = MappingProxyType({})) -> None:
        """Write the model as it is now, with its card."""
        if self.world.is_main:
            card = {"README.md": self._card()}
            save_model(self.run.path / name, self.parts.model, self.parts.tokenizer, card, about)
        self.world.barrier()

    def _card(self) -> str:
        """Return the card of the model as it is now."""
        begun = next((row for row in self.run.metrics() if row["step"] == 0), {})
        return model_card(self.config, step=self.step, metrics=self._latest_eval, start=begun)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.step.num_steps

    def _log(self, metrics: Mapping[str, float]) -> None:
        self.run.log(self.step, metrics)
        self._trackers.log(self.step, metrics)
        if self.listener is not None:
            self.listener({"step": self.step, **metrics})

    def _save(self) -> None:
        """Write everything that the rest of the run depends on."""
        parts = self.parts
        policies = self._states()
        memories = {name: each.state_dict() for name, each in parts.memories.items()}
        self._refuse_drift(policies, memories)
        state = {
            "config": self.config.model_dump(mode="json"),
            "written": self.run.written(),
            "step": self.step,
            "seconds": self._seconds,
            "best": self._best,
            "latest_eval": self._latest_eval,
            "scheduler": parts.scheduler.state_dict()["last_epoch"],
            "processes": self.world.size,
            "policies": policies,
            "classes": classes_of(parts),
            "ahead": self._ahead.state_dict(),
            **memories,
        }
        save_checkpoint(
            self.run.checkpoints,
            self.step,
            model=parts.model,
            tokenizer=parts.tokenizer,
            optimizer=parts.optimizer,
            teacher=parts.teacher.tensors(),
            state=state,
            keep=self.config.save.keep,
            shards=parts.shards,
        )
        self.world.barrier()

    def _states(self) -> dict[str, dict[str, Any]]:
        """Return the states of all policies. UserError for one that a checkpoint would lose or change."""
        return {name: state_of(name, policy) for name, policy in self.parts.policies.items()}

    def _refuse_drift(self, *states: Mapping[str, Any]) -> None:
        """UserError where processes no longer hold the same weights and decisions; one alone has nothing to compare."""
        if self.world.size == 1:
            return
        own = {} if self.parts.shards.is_sharded else self.parts.teacher.tensors()
        tensors = {**trained_tensors(self.parts.model), **own}
        self.world.refuse_difference(
            f"come to other weights or decisions by step {self.step}, which is not saved",
            fingerprint(tensors, dump_json(states, indent=None)),
            "some part of the run is random by itself, or the machines differ; go on from the last checkpoint with "
            "--resume, on machines of one kind",
        )

    def _restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Load a checkpoint and forget what was logged after it."""
        parts = self.parts
        refuse_other_parts(self.run.path, classes_of(parts), state.get("classes", {}))
        warn_of_processes(self.world.size, state.get("processes", 1))
        load_weights(folder, parts.model)
        parts.shards.absorb()
        load_optimizer(folder, parts.model, parts.optimizer, parts.shards)
        parts.teacher.load_tensors(load_teacher(folder, parts.shards))
        parts.set_schedule(state["scheduler"])
        for name, policy in parts.policies.items():
            policy.load_state_dict(state["policies"][name])
        for name, each in parts.memories.items():
            each.load_state_dict(state[name])
        self.step, self._seconds = state["step"], state["seconds"]
        self._best = kept_best(self.run.path / "best", self.step) or state["best"]
        self._latest_eval = state["latest_eval"]
        self._ahead.load_state_dict(state.get("ahead"))
        parts.sync(self.step)
        self.run.rewind(self.step, state["written"])

    def _finish(self) -> dict[str, Any]:
        """Write the final model and the result."""
        self._write_model("final")
        result = {"step": self.step, "seconds": self._seconds, "final": self._latest_eval, "best": self._best}
        self.run.finish(result)
        if self.report is not None and self._trackers.keep_files:
            self._trackers.attach(self.report(self.run.path))
        self.world.barrier()
        return result
