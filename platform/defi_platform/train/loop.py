"""The one training loop: what every Ray Train worker runs, for any recipe."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray.train
import ray.train.v2._internal.execution.context
import torch
from ray import cloudpickle
from ray.train.torch import get_device
from torch import Tensor

from defi_platform import storage
from defi_platform.config_file import to_mapping
from defi_platform.errors import UserError
from defi_platform.patience import run_patience
from defi_platform.remote import StoreAway
from defi_platform.train.async_validation import WAIT_AT_THE_END_S, AsyncValidation
from defi_platform.train.checkpoints import Position
from defi_platform.train.divergence import Diverged, UpdateJudge, Verdict
from defi_platform.train.draws import seed_of
from defi_platform.train.engine import prepare_process
from defi_platform.train.metrics import MetricsLog
from defi_platform.train.peak import known_peak_tflops
from defi_platform.train.preemption import PreemptionNotices
from defi_platform.train.ranks import Ranks
from defi_platform.train.recipe import Recipe
from defi_platform.train.restoring import restored
from defi_platform.train.results import CURVES, METRICS, SUMMARY, write_results
from defi_platform.train.saving import CheckpointSaver
from defi_platform.train.schedules import learning_rate
from defi_platform.train.status import StatusWriter
from defi_platform.train.step_clock import StepClock
from defi_platform.train.stopping import StopRequest
from defi_platform.train.tracking import Tracker
from defi_platform.train.validation import Validator, forward_pass, scalars, to_device


def train_worker(config: dict[str, bytes]) -> dict[str, Any]:
    """Entry point of a Ray Train worker.

    Args:
        config: "pickled": the recipe, the time when the driver started it, and whether its nodes are preemptible.
    Returns: {} after a complete run, {"stopped": step} after a stop request, {"error": [type, message]} for what
        a user has caused and no retry can cure.
    """
    settings = cloudpickle.loads(config["pickled"])
    recipe: Recipe = settings["recipe"]
    # Ray Train tells of every report under a logger named after its own file.
    logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)
    prepare_process(recipe.config.train.use_gpu, recipe.config.train.threads)
    # After a death the store may be away: every rank waits for it, before any of them waits for another.
    train = recipe.config.train
    run_patience(recipe.kind, train)(lambda: storage.is_folder(train.output))
    try:
        training = Training(recipe, settings["started"], settings["preemptible"])
    except StoreAway:
        raise  # it may come back: Ray Train tries again
    except UserError as error:
        # Found by every rank alike, before any of them waits for another: raising it would only make Ray
        # Train try again.
        return {"error": [type(error).__name__, str(error)]}
    return training.run()


class Training:
    """One attempt at a run, on one rank."""

    def __init__(self, recipe: Recipe, started: float, preemptible: bool = False):
        self.recipe, self.train = recipe, recipe.config.train
        self.run_folder = self.train.output
        if self.train.use_gpu:
            torch.cuda.set_device(get_device())
        self.ranks = Ranks(self.train.use_gpu)
        first = self.ranks.first
        self.status = StatusWriter(self.run_folder, recipe.kind, self.train.steps) if first else None
        self._tell(phase="building the model", force=True)
        torch.manual_seed(seed_of(self.train.seed, "weights"))
        model = recipe.build()
        recipe.tune(model)
        self.plan = recipe.plan("train")
        self.fingerprint = recipe.fingerprint(self.plan)
        self.engine, position = restored(recipe, model, self.fingerprint, self.ranks)
        self.resumed_from = position.step if position else None
        self.step = position.step if position else 0
        self._started, self._wall_before = started, 0.0
        if position:
            # Workers that died and came back under the same driver have one start; its time counts once.
            same_driver = position.clock["started"] == started
            self._wall_before = position.clock["before_s"] if same_driver else position.wall_s
        self.log = MetricsLog(self._path(METRICS), self.step) if first else None
        self.stop_request = StopRequest(self.run_folder) if first else None
        self.notices = PreemptionNotices(preemptible, first)
        self.tracker = (
            Tracker(recipe.config.tracking, self.run_folder, recipe.kind, to_mapping(recipe.config))
            if first
            else None
        )
        self.saver = CheckpointSaver(
            recipe.kind,
            self.run_folder,
            self.ranks,
            keep=self.train.keep_checkpoints,
            keep_best=self.train.keep_best,
            patience_s=self.train.storage_patience_s,
        )
        self.validator = Validator(recipe, self.engine, self.ranks)
        self.beside = AsyncValidation(recipe) if first else None
        self._validated: dict[int, float] = {}
        self._clock, self._logged_at = StepClock(self.train.use_gpu), self.step
        self._peak_tflops = self.train.peak_tflops or known_peak_tflops(self.train)
        # Counting them takes a few seconds at the paper's size: only where there is a peak to compare with.
        cost = recipe.cost() if first and self._peak_tflops else None
        self._flops_per_sample = cost.training_flops if cost else None
        self._applied = True
        self._judge = UpdateJudge(self.train.precision, self.train.max_skipped_in_a_row)

    # ----------------------------------------------------------------- the run

    def run(self) -> dict[str, Any]:
        """Trains from the position on to the end, then exports the model and writes the summary."""
        train = self.train
        self._log_attempt()
        batches = self._batches()
        if self.step == 0:
            self._validate()
        self._tell(phase="training", step=self.step, samples=self.step * train.global_batch, force=True)
        while self.step < train.steps:
            stop, look, row = self._update(batches)
            self.step += 1
            verdict = self._judge.judge(self._applied, row["loss"], row.get("grad_norm"))
            if verdict is Verdict.STOP or (verdict is Verdict.SKIP and self.step == train.steps):
                # The same on every rank, and it would come out the same again: no retry.
                message = self._diverged(row)
                self.saver.wait()
                self._close(f"stopped: {message}")
                return {"error": [Diverged.__name__, message]}
            if verdict is Verdict.SKIP:
                self._report_skipped()
            else:
                row.update(self.recipe.after_update(self.engine, self.step))
                self._report(row)
            if self.step % train.validate_every == 0 or self.step == train.steps:
                self._validate()
            leaving = look and self.notices.new()
            last = stop or self.step == train.steps
            # A state that may be ruined is not worth a checkpoint: the next whole update shows whether it is.
            if verdict is Verdict.KEEP and (self.step % train.checkpoint_every == 0 or last or leaving):
                self._checkpoint(needed=last)
                if leaving and self.log:
                    self.log.append({"step": self.step, "split": "preemption"})
            self.saver.check()
            self._take_over_validation()
            if stop and self.step < train.steps:
                self.saver.wait()
                self._close(f"stopped at step {self.step}")
                return {"stopped": self.step}
        self._finish()
        return {}

    def _update(self, batches: Iterator[dict[str, Any]]) -> tuple[bool, bool, dict[str, float]]:
        """One global batch.

        Returns: whether the run is asked to stop and whether all ranks should look for notices, the same on all of
            them; the mean loss, and what the model reports besides.
        """
        train, clock = self.train, self._clock
        rate = learning_rate(train.schedule, train.learning_rate, self.step, train.steps, train.warmup_steps)
        sums: dict[str, Tensor] = {}
        self.engine.module.train()
        for micro in range(self.engine.accumulation):
            clock.end("other")
            batch = next(batches)
            samples = self._expected(micro)
            if batch["sample"].tolist() != samples:
                raise RuntimeError(f"the data stream gave samples {batch['sample'].tolist()}, not {samples}")
            clock.end("data")
            batch = to_device(batch, self.engine.device)
            clock.end("transfer")
            outputs = forward_pass(self.engine, train.seed, batch, samples, "noise")
            clock.end("forward")
            self.engine.backward(outputs["loss"])
            clock.end("backward")
            self._applied = self.engine.step(rate)
            # On the device: bringing each figure to the host would make it wait for the device at every pass.
            for name, value in scalars(outputs).items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
            clock.end("optimizer")
        row = {name: value / self.engine.accumulation for name, value in sums.items()}
        # All that the ranks have to agree on goes in one exchange: each one makes the fast wait for the slow.
        flags = (self.stop_request is not None and self.stop_request.made(), self.notices.due())
        told = dict(zip(("stop", "look"), torch.tensor(flags, device=self.engine.device), strict=True))
        means = self.ranks.mean(row | told)
        stop, look = (means.pop(name) > 0 for name in told)
        norm = self.engine.grad_norm()
        return stop, look, means | {"lr": rate} | ({} if norm is None else {"grad_norm": norm})

    def _expected(self, micro: int) -> list[int]:
        per_rank = self.train.global_batch // self.ranks.world_size
        first = self.step * self.train.global_batch + self.ranks.rank * per_rank
        first += micro * self.train.micro_batch
        return list(range(first, first + self.train.micro_batch))

    def _batches(self) -> Iterator[dict[str, Any]]:
        train = self.train
        if self.step >= train.steps:
            return iter(())
        return iter(
            self.recipe.stream(
                self.plan,
                start=self.step * train.global_batch,
                stop=train.steps * train.global_batch,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                global_batch=train.global_batch,
                micro_batch=train.micro_batch,
            )
        )

    # ----------------------------------------------------------------- what is told

    def _log_attempt(self) -> None:
        if self.log:
            self.log.append(
                {
                    "step": self.step,
                    "split": "attempt",
                    "workers": self.ranks.world_size,
                    "zero_stage": self.train.zero_stage,
                    "accumulation": self.engine.accumulation,
                    "time": time.time(),
                }
            )

    def _report(self, row: dict[str, float]) -> None:
        step, samples = self.step, self.step * self.train.global_batch
        if step % self.train.log_every == 0 or step in (1, self.train.steps):
            self._clock.end("other")
            spent, since = self._clock.take(), step - self._logged_at
            phases = {f"{phase}_s": round(seconds / since, 6) for phase, seconds in spent.items()}
            self._logged_at = step
            entry = {"step": step, "split": "train", **row, **phases, "samples": samples}
            if self.train.use_gpu:
                entry["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
            if self._flops_per_sample and self._peak_tflops:
                working = sum(spent.values()) - spent["validation"]
                flops = self._flops_per_sample * self.train.global_batch * since / self.ranks.world_size
                entry["mfu"] = flops / (working * self._peak_tflops * 1e12)
            self._log(entry)
            busy = sum(spent.values()) - spent["validation"]
            self._tell(data_wait=spent["data"] / busy if busy else 0.0)
        self._tell(step=step, samples=samples, loss=row["loss"], checkpoint_step=self.saver.committed_step)

    def _report_skipped(self) -> None:
        """What a replay needs of an update that was left out."""
        first = (self.step - 1) * self.train.global_batch
        last = first + self.train.global_batch - 1
        if self.log:
            self.log.append({"step": self.step, "split": "skipped", "samples": [first, last]})
        self._tell(step=self.step, samples=last + 1, skipped_in_a_row=self._judge.in_a_row)

    def _diverged(self, row: dict[str, float]) -> str:
        first = (self.step - self._judge.in_a_row - (self._judge.in_a_row == 0)) * self.train.global_batch
        return (
            f"{self.recipe.kind}: loss {row['loss']}, gradient norm {row.get('grad_norm')} in step {self.step}, "
            f"samples {first} to {self.step * self.train.global_batch - 1}. The last checkpoint is from before them. "
            f"Lower train.learning_rate ({self.train.learning_rate:g}) or set train.clip_grad_norm "
            f"({self.train.clip_grad_norm:g}), and start again."
        )

    def _validate(self) -> None:
        self._clock.end("other")
        self._tell(phase="training", step=self.step, samples=self.step * self.train.global_batch)
        row = self.validator.run()
        self._validated = {self.step: row["loss"]}
        self._log({"step": self.step, "split": "validation", **row})
        self._clock.end("validation")

    def _take_over_validation(self, wait_s: float = 0.0) -> None:
        """Logs what was found out beside training, when there is something new."""
        if self.beside and (found := self.beside.finished(wait_s)):
            step, concluded = found
            self._log({"step": self.step, "split": "async_validation", "of_step": step, **concluded.figures})
            self._track_media(concluded.media)
        if self.beside:
            self.saver.spared_step = self.beside.step

    def _track_media(self, names: list[str]) -> None:
        if self.tracker:
            for name in names:
                self.tracker.media(name, self._path(name), self.step)

    def _log(self, entry: dict[str, Any]) -> None:
        if self.log:
            entry = {**entry, "wall_s": self._wall()}
            self.log.append(entry)
            if self.tracker:
                self.tracker.log(entry)

    # ----------------------------------------------------------------- checkpoints

    def _checkpoint(self, needed: bool) -> None:
        self._clock.end("other")
        buffers = {}
        kept = self._saved_buffers()
        for name, buffer in self.engine.module.named_buffers():
            if name in self.recipe.summed_buffers:
                buffers[name] = self.ranks.sum(buffer.clone())
            elif name in kept:
                buffers[name] = buffer
        position = Position(
            self.step,
            self.step * self.train.global_batch,
            self.recipe.identity(),
            self.engine.scalars(),
            self._wall(),
            {"started": self._started, "before_s": self._wall_before},
            self.fingerprint,
            self._validated.get(self.step),
        )
        if self.beside and not needed:
            self.beside.consider(self.step)
            self.saver.spared_step = self.beside.step
        self.saver.save(self.engine.pieces(), buffers if self.ranks.first else {}, position, needed=needed)
        if self.log:
            self.log.flush()
        self._clock.end("checkpoint")

    def _saved_buffers(self) -> set[str]:
        """Buffers that belong to the model's state; the others are constants it makes itself."""
        return set(self.engine.module.state_dict(keep_vars=True)) - {
            name for name, _ in self.engine.module.named_parameters()
        }

    # ----------------------------------------------------------------- the end

    def _finish(self) -> None:
        """Rank 0 exports the model and writes the summary, last, while the others wait."""
        self.saver.wait()
        if self.ranks.first:
            assert self.log
            if self.beside and self.beside.step is not None:
                self._tell(phase="waiting for the validation beside training", force=True)
            self._take_over_validation(WAIT_AT_THE_END_S)
            self._tell(phase="exporting the model", force=True)
            batch, rows = self.validator.batches()[0], self.log.rows()
            patient = run_patience(self.recipe.kind, self.train)
            summary = patient(
                lambda: write_results(
                    self.recipe, rows, self._facts(), batch, self.engine.device, self.fingerprint
                )
            )
            self._track_media([CURVES, *summary["media"]])
            self._close("complete")
            patient(lambda: storage.write_text(self._path(SUMMARY), json.dumps(summary, indent=1)))
        self.ranks.barrier()

    def _facts(self) -> dict[str, Any]:
        return {
            "steps": self.step,
            "samples": self.step * self.train.global_batch,
            "wall_s": self._wall(),
            "workers": self.ranks.world_size,
            "async_validations": self.beside.counts if self.beside else None,
            "resumed_from": self.resumed_from,
        }

    def _close(self, phase: str) -> None:
        if self.tracker:
            self.tracker.finish()
        if self.stop_request:
            self.stop_request.close()
        if self.log:
            self.log.close(self.train.storage_patience_s)
        self._tell(phase=phase, force=True, checkpoint_step=self.saver.committed_step)
        if self.status:
            self.status.flush()

    def _path(self, name: str) -> str:
        return storage.join(self.run_folder, name)

    def _wall(self) -> float:
        return self._wall_before + time.time() - self._started

    def _tell(self, force: bool = False, **values: Any) -> None:
        if self.status:
            self.status.update(force, **values)
