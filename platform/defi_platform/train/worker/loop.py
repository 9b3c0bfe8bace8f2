"""Training loop of every recipe."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import torch
from ray.train.torch import get_device
from torch import Tensor

from defi_platform import storage
from defi_platform.data.sampling.sharding import Shard
from defi_platform.storage.leases import in_use
from defi_platform.train.checkpoint.async_saver import CheckpointSaver
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.checkpoint.restore import restore_engine
from defi_platform.train.engine.collectives import Communicator
from defi_platform.train.engine.determinism import set_determinism
from defi_platform.train.engine.seeds import seed_of
from defi_platform.train.recipe import Recipe
from defi_platform.train.run_folder import retry_run_folder
from defi_platform.train.segments import rate_of
from defi_platform.train.stop_request import FileWatch, StopRequest
from defi_platform.train.validation.async_task import FINAL_TIMEOUT_S, AsyncValidation
from defi_platform.train.validation.loss import (
    Validator,
    evaluation_batch,
    forward_pass,
    scalars,
)
from defi_platform.train.worker.device_batches import DeviceBatches
from defi_platform.train.worker.divergence_policy import (
    Diverged,
    DivergencePolicy,
    UpdateDecision,
    divergence_message,
)
from defi_platform.train.worker.preemption import PreemptionNotices
from defi_platform.train.worker.reporter import Reporter
from defi_platform.train.worker.run_clock import RunClock
from defi_platform.train.worker.run_results import CURVES, SUMMARY, write_results


class Training:
    """One attempt at a run, on one rank.

    Args:
        recipe: of the run.
        started: Unix time at which the driver started the run.
        preemptible: whether nodes of this cluster can be preempted.
        successor: file that appears when another job takes the run folder over; None: none can.
    """

    def __init__(
        self, recipe: Recipe, started: float, preemptible: bool = False, successor: str | None = None
    ):
        self.recipe, self.train = recipe, recipe.config.train
        set_determinism(self.train)
        if self.train.use_gpu:
            torch.cuda.set_device(get_device())
        self.communicator = Communicator(self.train.use_gpu)
        is_rank_zero = self.communicator.is_rank_zero
        self.reporter = Reporter(recipe, is_rank_zero, self.communicator.world_size)
        self.reporter.update_status(phase="building the model", force=True)
        torch.manual_seed(seed_of(self.train.seed, "weights"))
        model = self.communicator.together(recipe.build)
        recipe.encode_texts(model, self.communicator)

        def plan() -> tuple[Any, str]:
            recipe.configure_model(model)
            plan = recipe.plan("train")
            return plan, recipe.fingerprint(plan)

        self.plan, self.fingerprint = self.communicator.together(plan)
        self.engine, position = restore_engine(recipe, model, self.fingerprint, self.communicator)
        self.resumed_from = position.step if position else None
        self.step = position.step if position else 0
        self.shard = Shard(
            start=self.step * self.train.global_batch,
            stop=self.train.steps * self.train.global_batch,
            rank=self.communicator.rank,
            world_size=self.communicator.world_size,
            global_batch=self.train.global_batch,
            micro_batch=self.train.micro_batch,
        )
        self.clock = RunClock.resume(started, position)
        self.reporter.start(self.step, self.clock, self.fingerprint, self.engine.accumulation)
        self.stop_request = StopRequest(self.train.output) if is_rank_zero else None
        self.successor = FileWatch(successor) if successor and is_rank_zero else None
        self.notices = PreemptionNotices(preemptible, is_rank_zero)
        self.saver = CheckpointSaver(
            recipe.kind,
            self.train.output,
            self.communicator,
            keep=self.train.keep_checkpoints,
            keep_best=self.train.keep_best,
            timeout_s=self.train.storage_patience_s,
            # A resume starts from the checkpoint and has no other copy of the rows before it.
            before_commit=self.reporter.wait_for_flush,
        )
        self._checkpoint_pending = False
        """A checkpoint was due and skipped; it is written as soon as there is capacity and a whole update."""
        self.validator = Validator(recipe, self.engine, self.communicator)
        self.async_validation = AsyncValidation(recipe) if is_rank_zero else None
        self._validation_loss: dict[int, float] = {}
        """Of the last validated step."""
        self._applied = True
        """DeepSpeed has applied the last update."""
        self._policy = DivergencePolicy(self.train.precision, self.train.max_skipped_in_a_row)

    # ----------------------------------------------------------------- steps

    def run(self) -> dict[str, Any]:
        """Trains from the resumed step to the end, then exports the model and writes the summary.

        Returns: {} after a complete run, {"stopped": step} after a stop request, {"error": [type, message]} after a
            divergence, or when another job has taken the run folder over.
        """
        train = self.train
        stream = self.recipe.stream(self.plan, self.shard) if self.step < train.steps else ()
        self.batches = DeviceBatches(stream, self.engine.device)
        if self.step == 0:
            self._validate()
        self._update_status(phase="training", force=True)
        while self.step < train.steps:
            flags, row = self._update()
            if flags["taken_over"]:
                # Nothing more is written: what stands there is the other job's.
                error = in_use(train.output, self.recipe.kind)
                return {"error": [type(error).__name__, str(error)]}
            stop = flags["stop"]
            self.step += 1
            decision = self._policy.decide(
                self._applied,
                row["loss"],
                row.get("grad_norm"),
                lowest_scale=self.engine.is_at_lowest_scale(),
            )
            if decision is UpdateDecision.STOP:
                return self._end_as_diverged(row)
            if decision is UpdateDecision.SKIP:
                self._log_skipped()
            else:
                row.update(self.recipe.after_update(self.engine, self.step))
                self.reporter.log_step(self.step, row, self.saver.committed_step)
            if self.step % train.validate_every == 0 or self.step == train.steps:
                self._validate()
            preempted = flags["poll_notices"] and self.notices.poll()
            last = stop or self.step == train.steps
            # A state that may be ruined is not worth a checkpoint: the next whole update shows whether it is. Where
            # none follows, the weights themselves do.
            sound = decision is UpdateDecision.KEEP or ((last or preempted) and self._is_sound())
            if not sound and self.step == train.steps:
                return self._end_as_diverged(row)
            if sound:
                self._checkpoint_if_due(flags["saver_full"], last, preempted)
            elif self.step % train.checkpoint_every == 0:
                self._postpone_checkpoint()
            if flags["checkpoint_skipped"]:
                self._log_skipped_checkpoint()
            self._log_async_validation()
            if stop and self.step < train.steps:
                self.saver.wait()
                self._close(
                    f"stopped at step {self.step}" + ("" if sound else ", no checkpoint of ruined weights")
                )
                return {"stopped": self.step}
        self._finish()
        return {}

    def _update(self) -> tuple[dict[str, bool], dict[str, float]]:
        """Computes one global batch and updates the weights (collective).

        Returns: flags that are true when they are on any rank: "stop" (the run is asked to), "taken_over" (by another
            job), "poll_notices" (of preemption), "saver_full" (enough checkpoints wait for the run folder),
            "checkpoint_skipped" (the local disk had no room for the last one); and the mean loss with the model's other
            scalars.
        """
        train, timer = self.train, self.reporter.timer
        rate = rate_of(self.recipe.segments, self.step)
        sums: dict[str, Tensor] = {}
        self.engine.module.train()
        for micro in range(self.engine.accumulation):
            timer.end("other")
            batch = next(self.batches)
            samples = list(self.shard.samples(self.step * train.global_batch, micro))
            if batch["sample"].tolist() != samples:
                raise RuntimeError(f"the data stream gave samples {batch['sample'].tolist()}, not {samples}")
            timer.end("data")
            outputs = forward_pass(self.engine, train.seed, batch, samples, "noise")
            timer.end("forward")
            self.engine.backward(outputs["loss"])
            timer.end("backward")
            self._applied = self.engine.step(rate)
            # On the device: bringing each figure to the host would make it wait for the device at every pass.
            for name, value in scalars(outputs).items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
            timer.end("optimizer")
        row = {name: value / self.engine.accumulation for name, value in sums.items()}
        # All that the ranks have to agree on goes in one exchange: each one makes the fast wait for the slow.
        flags = {
            "stop": self.stop_request is not None and self.stop_request.made(),
            "taken_over": self.successor is not None and self.successor.seen(),
            "poll_notices": self.notices.due(),
            "saver_full": self.saver.is_full(),
            "checkpoint_skipped": self.saver.take_skipped(),
        }
        values = torch.tensor(list(flags.values()), device=self.engine.device)
        means = self.communicator.mean(row | dict(zip(flags, values, strict=True)))
        agreed = {name: means.pop(name) > 0 for name in flags}
        norm = self.engine.grad_norm()
        return agreed, means | {"lr": rate} | ({} if norm is None else {"grad_norm": norm})

    # ----------------------------------------------------------------- reports

    def _update_status(self, force: bool = False, **values: Any) -> None:
        samples = self.step * self.train.global_batch
        self.reporter.update_status(force, step=self.step, samples=samples, **values)

    def _log_skipped(self) -> None:
        """Logs the samples of a skipped update, so that it can be replayed."""
        first = (self.step - 1) * self.train.global_batch
        last = first + self.train.global_batch - 1
        self.reporter.log_event(self.step, "skipped", samples=[first, last])
        self._update_status(skipped_in_a_row=self._policy.consecutive_skips)

    def _is_sound(self) -> bool:
        """True when all weights are finite numbers, and so was the last validation of this step (collective)."""
        ruined = torch.tensor(float(not self.engine.has_finite_weights()))
        loss = self._validation_loss.get(self.step, 0.0)
        return math.isfinite(loss) and not self.communicator.sum(ruined)

    def _end_as_diverged(self, row: dict[str, float]) -> dict[str, Any]:
        """Ends the attempt without another checkpoint. Returns: the result of `run`."""
        # The same on every rank, and it would come out the same again: no retry.
        self.saver.wait()
        message = self._log_divergence(row)
        self._close(f"stopped: {message}")
        return {"error": [Diverged.__name__, message]}

    def _log_divergence(self, row: dict[str, float]) -> str:
        """Logs the samples of all consecutive bad updates. Returns: the message for the user."""
        first = (self.step - max(1, self._policy.consecutive_skips)) * self.train.global_batch
        last = self.step * self.train.global_batch - 1
        self.reporter.log_event(self.step, "diverged", samples=[first, last])
        checkpoint = self.saver.committed_step or self.resumed_from
        return divergence_message(self.recipe.kind, self.train, self.step, (first, last), row, checkpoint)

    def _validate(self) -> None:
        self.reporter.timer.end("other")
        self._update_status(phase="training")
        row = self.validator.run()
        self._validation_loss = {self.step: row["loss"]}
        self.reporter.log_validation(self.step, row)
        self.reporter.timer.end("validation")

    def _log_async_validation(self, wait_s: float = 0.0) -> None:
        """Logs the report of an async validation, when there is a new one."""
        if self.async_validation is None:
            return
        if result := self.async_validation.poll(wait_s):
            of_step, report = result
            row = {"step": self.step, "split": "async_validation", "of_step": of_step, **report.figures}
            self.reporter.log_metrics(row)
            self.reporter.track_media(report.media, self.step)
        self.saver.pinned_step = self.async_validation.step

    # ----------------------------------------------------------------- checkpoints

    def _checkpoint_if_due(self, full: bool, last: bool, preempted: bool) -> None:
        """Writes a checkpoint where one is due, at the end, or because a node will go (collective).

        Training waits no more than a moment for a store that is slow or away: a checkpoint that is skipped then is
        written as soon as there is capacity.

        Args:
            full: some rank has no capacity for another one.
            last: the attempt ends with this step.
            preempted: a node has been announced to go.
        """
        due = self.step % self.train.checkpoint_every == 0
        pending = due or self._checkpoint_pending
        if last or preempted or (pending and not full) or (due and self.saver.wait_for_capacity()):
            self._checkpoint_pending = False
            self._checkpoint(required=last)
            if preempted:
                self.reporter.log_event(self.step, "preemption")
        elif due:
            self._postpone_checkpoint()
            self._log_skipped_checkpoint()
            if self.communicator.is_rank_zero:
                waiting = f"earlier ones still wait for {self.train.output}"
                print(f"{self.recipe.kind}: no checkpoint of step {self.step}: {waiting}", flush=True)

    def _postpone_checkpoint(self) -> None:
        """Leaves out the checkpoint that is due now, and with it its validation; the next step writes one if it can."""
        self._checkpoint_pending = True
        if self.async_validation:
            self.async_validation.skip(self.step)

    def _log_skipped_checkpoint(self) -> None:
        self.reporter.log_event(self.step, "checkpoint_left_out")

    def _checkpoint(self, required: bool) -> None:
        self.reporter.timer.end("other")
        buffers = {}
        saved = self._saved_buffers()
        for name, buffer in self.engine.module.named_buffers():
            if name in self.recipe.summed_buffers:
                buffers[name] = self.communicator.sum(buffer.clone())
            elif name in saved:
                buffers[name] = buffer
        position = Position(
            step=self.step,
            samples=self.step * self.train.global_batch,
            model=self.recipe.identity(),
            scalars=self.engine.scalars(),
            wall_s=self.clock.wall_s(),
            clock=self.clock.state(),
            plan=self.fingerprint,
            data=self.recipe.data_version(),
            validation_loss=self._validation_loss.get(self.step),
            segments=[asdict(segment) for segment in self.recipe.segments],
        )
        if self.async_validation and not required:
            self.async_validation.start_if_due(self.step)
            self.saver.pinned_step = self.async_validation.step
        self.reporter.flush()
        self.saver.save(
            self.engine.fragments(),
            buffers if self.communicator.is_rank_zero else {},
            position,
            required=required,
        )
        self.reporter.timer.end("checkpoint")

    def _saved_buffers(self) -> set[str]:
        """Buffers that belong to the model's state; the others are constants it makes itself."""
        return set(self.engine.module.state_dict(keep_vars=True)) - {
            name for name, _ in self.engine.module.named_parameters()
        }

    # ----------------------------------------------------------------- the end

    def _finish(self) -> None:
        """Exports the model and writes the summary, last, on rank 0 while the others wait."""
        self.saver.wait()
        if self.communicator.is_rank_zero:
            if self.async_validation and self.async_validation.step is not None:
                self.reporter.update_status(phase="waiting for the async validation", force=True)
            self._log_async_validation(FINAL_TIMEOUT_S)
            self.reporter.update_status(phase="exporting the model", force=True)
            batch = evaluation_batch(self.recipe)
            summary = retry_run_folder(self.recipe.kind, self.train, lambda: self._write_results(batch))
            self.reporter.track_media([CURVES, *summary["media"]], self.step)
            self._close("complete")
            path, text = storage.join(self.train.output, SUMMARY), json.dumps(summary, indent=1)
            retry_run_folder(self.recipe.kind, self.train, lambda: storage.write_text(path, text))
        self.communicator.barrier()

    def _write_results(self, batch: dict[str, Any]) -> dict[str, Any]:
        facts = {
            "steps": self.step,
            "samples": self.step * self.train.global_batch,
            "wall_s": self.clock.wall_s(),
            "workers": self.communicator.world_size,
            "async_validations": self.async_validation.counts if self.async_validation else None,
            "resumed_from": self.resumed_from,
        }
        rows = self.reporter.rows()
        return write_results(self.recipe, rows, facts, batch, self.engine.device, self.fingerprint)

    def _close(self, phase: str) -> None:
        for watch in (self.stop_request, self.successor):
            if watch:
                watch.close()
        self.batches.close()
        self.reporter.close(phase, self.saver.committed_step)
