"""The one training loop: what every Ray Train worker runs, for any recipe."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.v2._internal.execution.context
import torch
import torch.distributed as distributed
from ray import cloudpickle
from ray.train.torch import get_device
from torch import Tensor

from defi_platform import storage
from defi_platform.config import to_mapping
from defi_platform.errors import CheckpointError, UserError
from defi_platform.train import checkpoints
from defi_platform.train.checkpoints import Position
from defi_platform.train.curves import write_curves
from defi_platform.train.divergence import Diverged, UpdateJudge, Verdict
from defi_platform.train.draws import sample_generators, seed_of
from defi_platform.train.engine import TrainingEngine, prepare_process
from defi_platform.train.export import export_model
from defi_platform.train.metrics import MetricsLog
from defi_platform.train.recipe import Recipe
from defi_platform.train.schedules import learning_rate
from defi_platform.train.status import StatusWriter
from defi_platform.train.tracking import Tracker

METRICS, CURVES, SUMMARY, MODEL, STOP = "metrics.jsonl", "curves.png", "summary.json", "model", "stop"

PHASES = ("data", "forward", "backward", "update")
"""Parts of a step that are timed, each on the host's clock: on a GPU, work is told from when it was asked for."""


def train_worker(config: dict[str, bytes]) -> dict[str, Any]:
    """Entry point of a Ray Train worker.

    Args:
        config: "pickled": the recipe and the time when the driver started it.
    Returns: {} after a complete run, {"stopped": step} after a stop request, {"error": [type, message]} for what
        a user has caused and no retry can cure.
    """
    settings = cloudpickle.loads(config["pickled"])
    recipe: Recipe = settings["recipe"]
    # Ray Train tells of every report under a logger named after its own file.
    logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)
    prepare_process(recipe.config.train.use_gpu, recipe.config.train.threads)
    try:
        training = Training(recipe, settings["started"])
    except UserError as error:
        # Found by every rank alike, before any of them waits for another: raising it would only make Ray
        # Train try again.
        return {"error": [type(error).__name__, str(error)]}
    return training.run()


class Training:
    """One attempt at a run, on one rank."""

    def __init__(self, recipe: Recipe, started: float):
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.recipe, self.train = recipe, recipe.config.train
        self.run_folder = self.train.output
        self._started, self._wall_before = started, 0.0
        self.status = StatusWriter(self.run_folder, recipe.kind, self.train.steps) if self.rank == 0 else None
        self._tell(phase="building the model", force=True)
        if self.train.use_gpu:
            torch.cuda.set_device(get_device())
        torch.manual_seed(seed_of(self.train.seed, "weights"))
        model = recipe.build()
        self.plan = recipe.plan("train")
        self.resumed_from: int | None = None
        self.position = Position(0, 0, recipe.identity(), {"adam_step": 0.0})
        self.engine = self._restored(model)
        self.log = MetricsLog(self._path(METRICS), self.position.step) if self.rank == 0 else None
        self.tracker = (
            Tracker(recipe.config.tracking, self.run_folder, recipe.kind, to_mapping(recipe.config))
            if self.rank == 0
            else None
        )
        self._validation: list[dict[str, Any]] | None = None
        self._seconds, self._logged_at = dict.fromkeys(PHASES, 0.0), self.position.step
        self._applied, self._judge = True, UpdateJudge(self.train.precision)

    # ----------------------------------------------------------------- the run

    def run(self) -> dict[str, Any]:
        """Trains from the position on to the end, then exports the model and writes the summary."""
        train, step = self.train, self.position.step
        batches = self._batches(step)
        if step == 0:
            self._validate(0)
        self._tell(phase="training", step=step, samples=step * train.global_batch, force=True)
        saved = step
        while step < train.steps:
            row = self._update(step, batches)
            step += 1
            verdict = self._judge.judge(self._applied, row["loss"], row.get("grad_norm"))
            if verdict is Verdict.STOP or (verdict is Verdict.SKIP and step == train.steps):
                # The same on every rank, and it would come out the same again: no retry.
                message = self._diverged(step, row)
                self._close(f"stopped: {message}")
                return {"error": [Diverged.__name__, message]}
            if verdict is Verdict.SKIP:
                self._report_skipped(step)
            else:
                row.update(self.recipe.after_update(self.engine, step))
                self._report(step, row)
            if step % train.validate_every == 0 or step == train.steps:
                self._validate(step)
            stop = self._stop_requested()
            # A state that may be ruined is not worth a checkpoint: the next whole update shows whether it is.
            if verdict is Verdict.KEEP and (
                step % train.checkpoint_every == 0 or step == train.steps or stop
            ):
                self._checkpoint(step)
                saved = step
            if stop and step < train.steps:
                self._close(f"stopped at step {step}")
                return {"stopped": step}
        self._finish(saved)
        return {}

    def _diverged(self, step: int, row: dict[str, float]) -> str:
        first = (step - self._judge.in_a_row - (self._judge.in_a_row == 0)) * self.train.global_batch
        return (
            f"{self.recipe.kind}: loss {row['loss']}, gradient norm {row.get('grad_norm')} in step {step}, samples "
            f"{first} to {step * self.train.global_batch - 1}. The last checkpoint is from before them. Lower "
            f"train.learning_rate ({self.train.learning_rate:g}) or set train.clip_grad_norm "
            f"({self.train.clip_grad_norm:g}), and start again."
        )

    def _report_skipped(self, step: int) -> None:
        """What a replay needs of an update that was left out."""
        if self.log:
            first = (step - 1) * self.train.global_batch
            last = first + self.train.global_batch - 1
            self.log.append({"step": step, "split": "skipped", "samples": [first, last]})
        self._tell(step=step, samples=step * self.train.global_batch, skipped_in_a_row=self._judge.in_a_row)

    def _update(self, step: int, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One global batch: the mean loss over it, and what the model reports besides."""
        train = self.train
        rate = learning_rate(train.schedule, train.learning_rate, step, train.steps, train.warmup_steps)
        sums: dict[str, Tensor] = {}
        self.engine.module.train()
        for micro in range(self.engine.accumulation):
            began = time.perf_counter()
            batch = next(batches)
            arrived = time.perf_counter()
            samples = self._expected(step, micro)
            if batch["sample"].tolist() != samples:
                raise RuntimeError(f"the data stream gave samples {batch['sample'].tolist()}, not {samples}")
            outputs = self._forward(batch, samples, "noise")
            forwarded = time.perf_counter()
            self.engine.backward(outputs["loss"])
            backwarded = time.perf_counter()
            self._applied = self.engine.step(rate)
            for name, value in _scalars(outputs).items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
            marks = (began, arrived, forwarded, backwarded, time.perf_counter())
            for phase, (earlier, later) in zip(PHASES, itertools.pairwise(marks), strict=True):
                self._seconds[phase] += later - earlier
        row = self._mean({name: value / self.engine.accumulation for name, value in sums.items()})
        norm = self.engine.grad_norm()
        return row | {"lr": rate} | ({} if norm is None else {"grad_norm": norm})

    def _expected(self, step: int, micro: int) -> list[int]:
        per_rank = self.train.global_batch // self.world_size
        first = step * self.train.global_batch + self.rank * per_rank + micro * self.train.micro_batch
        return list(range(first, first + self.train.micro_batch))

    def _forward(self, batch: dict[str, Any], samples: list[int], purpose: str) -> dict[str, Tensor]:
        # Dropout draws from torch's global generator: seeded by the micro-batch's place in the plan, it does
        # not depend on which rank computes it, nor on what was computed before.
        torch.manual_seed(seed_of(self.train.seed, "dropout", samples[0]))
        on_device = {
            name: value.to(self.engine.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        return self.engine.forward(on_device, sample_generators(self.train.seed, purpose, samples))

    def _batches(self, step: int) -> Iterator[dict[str, Any]]:
        train = self.train
        if step >= train.steps:
            return iter(())
        return iter(
            self.recipe.stream(
                self.plan,
                start=step * train.global_batch,
                stop=train.steps * train.global_batch,
                rank=self.rank,
                world_size=self.world_size,
                global_batch=train.global_batch,
                micro_batch=train.micro_batch,
            )
        )

    def _report(self, step: int, row: dict[str, float]) -> None:
        samples = step * self.train.global_batch
        if self.log and (step % self.train.log_every == 0 or step in (1, self.train.steps)):
            since = step - self._logged_at
            phases = {f"{phase}_s": round(self._seconds[phase] / since, 6) for phase in PHASES}
            entry = {
                "step": step,
                "split": "train",
                **row,
                **phases,
                "samples": samples,
                "wall_s": self._wall(),
            }
            self._logged_at, self._seconds = step, dict.fromkeys(PHASES, 0.0)
            self.log.append(entry)
            if self.tracker:
                self.tracker.log(entry)
            busy = sum(phases.values())
            self._tell(data_wait=phases["data_s"] / busy if busy else 0.0)
        self._tell(step=step, samples=samples, loss=row["loss"])

    # ----------------------------------------------------------------- validation

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Loss on the same held-out samples with the same draws each time, whatever the world size."""
        self._tell(phase="training", step=step, samples=step * self.train.global_batch)
        batches = self._validation_batches()
        self.engine.module.eval()
        sums: dict[str, Tensor] = {}
        counts: Tensor | None = None
        shares = self._shares(self.train.validation_batches)
        for number in range(max(last - first for first, last in shares)):
            # Under ZeRO 3 every rank has to take part in every forward pass, so a rank that has run out
            # repeats its last batch and leaves it out of the sums.
            batch = batches[min(number, len(batches) - 1)]
            outputs = self._forward(batch, batch["sample"].tolist(), "validation")
            weight = float(number < shares[self.rank][1] - shares[self.rank][0])
            for name, value in _scalars(outputs).items():
                sums[name] = (
                    sums.get(name, torch.zeros((), dtype=torch.float64)) + weight * value.double().cpu()
                )
            found = self.recipe.validation_counts(outputs)
            if found is not None:
                found = weight * found.double().cpu()
                counts = found if counts is None else counts + found
        share = self.world_size / self.train.validation_batches
        row = self._mean({name: value * share for name, value in sums.items()})
        if counts is not None:
            row.update(self.recipe.validation_metrics(self._all_reduce(counts)))
        if self.log:
            entry = {"step": step, "split": "validation", **row, "wall_s": self._wall()}
            self.log.append(entry)
            if self.tracker:
                self.tracker.log(entry)

    def _shares(self, number: int) -> list[tuple[int, int]]:
        bounds = [number * r // self.world_size for r in range(self.world_size + 1)]
        # A rank without a batch of its own still needs one to take part with.
        return [(first, last) if last > first else (0, 0) for first, last in itertools.pairwise(bounds)]

    def _validation_batches(self) -> list[dict[str, Any]]:
        if self._validation is None:
            size = self.train.micro_batch
            first, last = self._shares(self.train.validation_batches)[self.rank]
            self._validation = list(
                self.recipe.stream(
                    self.recipe.plan("validation"),
                    start=first * size,
                    stop=max(last, first + 1) * size,
                    rank=0,
                    world_size=1,
                    global_batch=size,
                    micro_batch=size,
                )
            )
        return self._validation

    # ----------------------------------------------------------------- checkpoints

    def _restored(self, model: torch.nn.Module) -> TrainingEngine:
        """The engine around the model, both as the newest whole checkpoint left them."""
        reader = self._newest()
        if reader is None:
            return TrainingEngine(model, self.train, self.world_size)
        with reader:
            self._check_plan(reader.position)
            shapes = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    shapes[name] = parameter.shape
                    parameter.data.copy_(reader.read("param", name, parameter.shape))
            for name, buffer in model.named_buffers():
                if name in reader.names("buffer"):
                    buffer.copy_(reader.read("buffer", name, buffer.shape))
                if name in self.recipe.summed_buffers and self.rank > 0:
                    # The sum over the ranks lives on in rank 0's count alone.
                    buffer.zero_()
            extra = sorted(set(reader.names("param")) - set(shapes))
            if extra:
                raise CheckpointError(
                    f"the checkpoint in {self.run_folder} also holds '{extra[0]}', which this model has not. "
                    "Choose another train.output, or the settings that it was written with."
                )
            engine = TrainingEngine(model, self.train, self.world_size)
            self.position = reader.position
            clock = self.position.clock
            # Workers that died and came back under the same driver have one start; its time counts once.
            same_driver = clock["started"] == self._started
            self._wall_before = clock["before_s"] if same_driver else self.position.wall_s
            engine.restore(self.position.scalars, lambda name, kind: reader.read(kind, name, shapes[name]))
        self.resumed_from = self.position.step
        if self.rank == 0:
            print(f"{self.recipe.kind}: goes on from step {self.position.step}", flush=True)
        return engine

    def _check_plan(self, position: Position) -> None:
        if position.plan != self.recipe.fingerprint(self.plan):
            raise CheckpointError(
                f"the videos or how they are sampled have changed since {self.run_folder} reached step "
                f"{position.step}: its sample numbers would mean other samples. Restore the corpora and "
                "data settings, or choose another train.output."
            )

    def _newest(self) -> checkpoints.Reader | None:
        """Opens the newest checkpoint that is whole; rank 0 chooses, so that all take the same."""
        choice: list[str | None] = [None]
        if self.rank == 0:
            for candidate in checkpoints.committed(self.run_folder):
                try:
                    checkpoints.Reader(candidate).close()
                except checkpoints.DamagedCheckpoint as error:
                    print(f"{self.recipe.kind}: {error} Falling back to the one before.", flush=True)
                    storage.delete(candidate.uri)
                    continue
                choice = [candidate.uri]
                break
            checkpoints.prune(self.run_folder, self.train.keep_checkpoints, unfinished=True)
        distributed.broadcast_object_list(choice, src=0, device=self._collective_device())
        for candidate in checkpoints.committed(self.run_folder):
            if candidate.uri == choice[0]:
                return checkpoints.Reader(candidate)
        return None

    def _checkpoint(self, step: int) -> None:
        """Each rank writes its shard to local disk and from there to the run folder."""
        buffers = {}
        for name, buffer in self.engine.module.named_buffers():
            if name in self.recipe.summed_buffers:
                buffers[name] = self._all_reduce(buffer.clone())
            elif name in self._saved_buffers():
                buffers[name] = buffer
        position = Position(
            step,
            step * self.train.global_batch,
            self.recipe.identity(),
            self.engine.scalars(),
            self._wall(),
            {"started": self._started, "before_s": self._wall_before},
            self.recipe.fingerprint(self.plan),
        )
        with tempfile.TemporaryDirectory(prefix="defi-shard-") as scratch:
            checkpoints.write_shard(
                Path(scratch),
                self.rank,
                self.world_size,
                self.engine.pieces(),
                buffers if self.rank == 0 else {},
                position,
            )
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(scratch),
                checkpoint_dir_name=checkpoints.folder_name(step),
                checkpoint_upload_fn=self._upload,
            )
        # A rank comes back when its own shard is up; only together are they a checkpoint, for the pruning here
        # and for the export at the end.
        distributed.barrier()
        if self.rank == 0:
            checkpoints.prune(self.run_folder, self.train.keep_checkpoints, unfinished=False)
            assert self.log
            self.log.flush()
            self._tell(checkpoint_step=step)

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        checkpoints.upload(checkpoint.path, storage.join(self.run_folder, checkpoints.FOLDER, name))
        context = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            context.build_checkpoint_path_from_name(name), filesystem=context.storage_filesystem
        )

    def _saved_buffers(self) -> set[str]:
        """Buffers that belong to the model's state; the others are constants it makes itself."""
        return set(self.engine.module.state_dict(keep_vars=True)) - {
            name for name, _ in self.engine.module.named_parameters()
        }

    # ----------------------------------------------------------------- the end

    def _finish(self, saved: int) -> None:
        """Rank 0 exports the model and writes the summary, last, while the others wait."""
        if self.rank == 0:
            assert self.log
            self._tell(phase="exporting the model", force=True)
            model = export_model(self.recipe, storage.join(self.run_folder, MODEL))
            media = self.recipe.media(model, self._validation_batches()[0], self.run_folder, saved)
            rows = self.log.rows()
            self.log.flush()
            write_curves(rows, self._path(CURVES), f"{self.recipe.kind} ({self.recipe.config.model.preset})")
            if self.tracker:
                for picture in (CURVES, *media):
                    self.tracker.image(picture, self._path(picture), saved)
            validations = [row for row in rows if row["split"] == "validation"]
            left_out = sum(row["split"] == "skipped" for row in rows)
            summary = {
                "kind": self.recipe.kind,
                "model": self.recipe.identity(),
                "steps": saved,
                "samples": saved * self.train.global_batch,
                "wall_s": self._wall(),
                "samples_per_s": saved * self.train.global_batch / max(self._wall(), 1e-9),
                "workers": self.world_size,
                "skipped_updates": left_out,
                "validation": {"first": validations[0], "last": validations[-1]},
                "skipped": self.recipe.skipped(),
                "resumed_from": self.resumed_from,
                "media": media,
                **self.recipe.summary(validations[-1]),
            }
            self._close("complete")
            storage.write_text(self._path(SUMMARY), json.dumps(summary, indent=1))
        distributed.barrier()

    def _close(self, phase: str) -> None:
        if self.tracker:
            self.tracker.finish()
        if self.log:
            self.log.flush()
        self._tell(phase=phase, force=True)

    # ----------------------------------------------------------------- between ranks

    def _mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(values)
        total = self._all_reduce(torch.stack([values[name] for name in names]))
        return {name: float(value) / self.world_size for name, value in zip(names, total, strict=True)}

    def _all_reduce(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            moved = value.to(self._collective_device())
            distributed.all_reduce(moved)
            return moved.to(value.device)
        return value

    def _stop_requested(self) -> bool:
        asked = torch.zeros(1)
        if self.rank == 0 and not storage.is_remote(self.run_folder):
            asked += float(storage.exists(self._path(STOP)))
        return bool(self._all_reduce(asked).item())

    def _collective_device(self) -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device()) if self.train.use_gpu else torch.device("cpu")
        )

    def _path(self, name: str) -> str:
        return storage.join(self.run_folder, name)

    def _wall(self) -> float:
        return self._wall_before + time.time() - self._started

    def _tell(self, force: bool = False, **values: Any) -> None:
        if self.status:
            self.status.update(force, **values)


def _scalars(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach()
        for name, value in outputs.items()
        if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
    }
