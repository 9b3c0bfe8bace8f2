"""The one training loop, for any recipe."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from ray.train.torch import get_device
from torch import Tensor

from defi_platform import storage
from defi_platform.config.loader import to_mapping
from defi_platform.data.sampling.sharding import Shard
from defi_platform.retry import run_patience
from defi_platform.train.checkpoint.async_saver import CheckpointSaver
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.checkpoint.restore import restored
from defi_platform.train.engine.collectives import Ranks
from defi_platform.train.engine.lr_schedule import learning_rate
from defi_platform.train.engine.seeds import seed_of
from defi_platform.train.observability.code_version import code_version
from defi_platform.train.observability.metrics_log import MetricsLog
from defi_platform.train.observability.peak_flops import known_peak_tflops
from defi_platform.train.observability.phase_timer import StepClock
from defi_platform.train.observability.status import StatusWriter
from defi_platform.train.observability.wandb_tracker import Tracker
from defi_platform.train.recipe import Recipe
from defi_platform.train.stop_request import StopRequest
from defi_platform.train.validation.async_task import WAIT_AT_THE_END_S, AsyncValidation
from defi_platform.train.validation.loss import Validator, forward_pass, scalars, to_device
from defi_platform.train.worker.divergence_policy import (
    Diverged,
    UpdateDecision,
    UpdateJudge,
    divergence_told,
)
from defi_platform.train.worker.preemption import PreemptionNotices
from defi_platform.train.worker.run_results import CURVES, METRICS, SUMMARY, write_results


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
        recipe.configure_model(model)
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
        self._shard = Shard(
            start=self.step * self.train.global_batch,
            stop=self.train.steps * self.train.global_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            global_batch=self.train.global_batch,
            micro_batch=self.train.micro_batch,
        )
        self.log = MetricsLog(self._path(METRICS), self.step) if first else None
        self.stop_request = StopRequest(self.run_folder) if first else None
        self.notices = PreemptionNotices(preemptible, first)
        self._code = code_version() if first else {}
        origin = {**to_mapping(recipe.config), "code": self._code, "data_fingerprint": self.fingerprint}
        tracking = recipe.config.tracking
        self.tracker = Tracker(tracking, self.run_folder, recipe.kind, origin) if first else None
        self.saver = CheckpointSaver(
            recipe.kind,
            self.run_folder,
            self.ranks,
            keep=self.train.keep_checkpoints,
            keep_best=self.train.keep_best,
            patience_s=self.train.storage_patience_s,
        )
        self._owes_checkpoint = False
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
            told, row = self._update(batches)
            stop = told["stop"]
            self.step += 1
            verdict = self._judge.judge(self._applied, row["loss"], row.get("grad_norm"))
            if verdict is UpdateDecision.STOP or (
                verdict is UpdateDecision.SKIP and self.step == train.steps
            ):
                # The same on every rank, and it would come out the same again: no retry.
                message = self._report_diverged(row)
                self.saver.wait()
                self._close(f"stopped: {message}")
                return {"error": [Diverged.__name__, message]}
            if verdict is UpdateDecision.SKIP:
                self._report_skipped()
            else:
                row.update(self.recipe.after_update(self.engine, self.step))
                self._report(row)
            if self.step % train.validate_every == 0 or self.step == train.steps:
                self._validate()
            leaving = told["look"] and self.notices.new()
            last = stop or self.step == train.steps
            # A state that may be ruined is not worth a checkpoint: the next whole update shows whether it is.
            if verdict is UpdateDecision.KEEP:
                self._checkpoint_when_due(told["full"], last, leaving)
            if told["missed"]:
                self._count_left_out()
            self._take_over_validation()
            if stop and self.step < train.steps:
                self.saver.wait()
                self._close(f"stopped at step {self.step}")
                return {"stopped": self.step}
        self._finish()
        return {}

    def _update(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, bool], dict[str, float]]:
        """One global batch.

        Returns: what some rank tells and all have to heed: "stop" (the run is asked to), "look" (for notices), "full"
            (enough checkpoints wait for the run folder), "missed" (there was no disk for the last one); the mean
            loss, and what the model reports besides.
        """
        train, clock = self.train, self._clock
        rate = learning_rate(train.schedule, train.learning_rate, self.step, train.steps, train.warmup_steps)
        sums: dict[str, Tensor] = {}
        self.engine.module.train()
        for micro in range(self.engine.accumulation):
            clock.end("other")
            batch = next(batches)
            samples = list(self._shard.samples(self.step * train.global_batch, micro))
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
        flags = {
            "stop": self.stop_request is not None and self.stop_request.made(),
            "look": self.notices.due(),
            "full": self.saver.full(),
            "missed": self.saver.missed(),
        }
        values = torch.tensor(list(flags.values()), device=self.engine.device)
        means = self.ranks.mean(row | dict(zip(flags, values, strict=True)))
        told = {name: means.pop(name) > 0 for name in flags}
        norm = self.engine.grad_norm()
        return told, means | {"lr": rate} | ({} if norm is None else {"grad_norm": norm})

    def _batches(self) -> Iterator[dict[str, Any]]:
        if self.step >= self.train.steps:
            return iter(())
        return iter(self.recipe.stream(self.plan, self._shard))

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
                    "source": self._code["source"],
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

    def _report_diverged(self, row: dict[str, float]) -> str:
        """Keeps what a replay needs of all updates in a row that were bad. Returns: what to tell."""
        first = (self.step - max(1, self._judge.in_a_row)) * self.train.global_batch
        last = self.step * self.train.global_batch - 1
        if self.log:
            self.log.append({"step": self.step, "split": "diverged", "samples": [first, last]})
        return divergence_told(self.recipe.kind, self.train, self.step, (first, last), row)

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

    def _checkpoint_when_due(self, full: bool, last: bool, leaving: bool) -> None:
        """Writes one where it is due, or at the end, or because a node will go. Training waits no more than a moment for
        a store that is slow or away: what is left out then is written as soon as there is room (collective).

        Args:
            full: some rank has no room for another one.
        """
        due = self.step % self.train.checkpoint_every == 0
        owed = due or self._owes_checkpoint
        if last or leaving or (owed and not full) or (due and self.saver.makes_room()):
            self._owes_checkpoint = False
            self._checkpoint(needed=last)
            if leaving and self.log:
                self.log.append({"step": self.step, "split": "preemption"})
        elif due:
            self._owes_checkpoint = True
            if self.beside:
                self.beside.leave_out(self.step)
            self._count_left_out()
            if self.ranks.first:
                waiting = f"earlier ones still wait for {self.run_folder}"
                print(f"{self.recipe.kind}: no checkpoint of step {self.step}: {waiting}", flush=True)

    def _count_left_out(self) -> None:
        if self.log:
            self.log.append({"step": self.step, "split": "checkpoint_left_out"})

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
