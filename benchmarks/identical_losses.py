"""Losses of this checkout and of another one, bit for bit: the proof that a change alters no result.

    python benchmarks/identical_losses.py [--against FOLDER_OR_REVISION] [--steps 20] [--keep FOLDER]

Records a small Meta-World corpus once. Then each side trains GFDM, GIDM and the fused policy at nano size with its own
code and its own configs/demo, and every figure of metrics.jsonl (training and validation), the data fingerprint and the
exported weights are compared for equality. Exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

CHECKOUT = Path(__file__).resolve().parents[1]
RUNS = {"gfdm": "pretrain_gfdm", "gidm": "pretrain_gidm", "policy": "finetune_policy"}
"""Run folder -> job, in the order in which they need each other."""
NOT_COMPARED = ("_s", "mfu", "time", "gpu_peak_bytes")
"""Ends of the names of figures that say how fast a run was, not what it computed."""


@dataclass(frozen=True)
class Side:
    """One of the two checkouts and the folder of its runs."""

    checkout: Path
    runs: Path

    def start(self, job: str, *overrides: str) -> None:
        """Runs a job of this checkout in a process of its own.

        Raises: SystemExit with the end of its output when it fails.
        """
        script, config = self.checkout / "jobs" / f"{job}.py", self.checkout / "configs/demo" / f"{job}.yaml"
        # This interpreter holds an installation of one of the two: the other checkout must win over it.
        roots = os.pathsep.join([str(self.checkout / "platform"), str(self.checkout)])
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": roots, "DEFI_HOME": str(self.runs)}
        where = subprocess.run(
            [sys.executable, "-c", "import defi_platform, defi_models; print(defi_platform.__file__)"],
            env=environment, cwd=self.runs, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert self.checkout in Path(where.stdout.strip()).parents, f"imports come from {where.stdout}"
        print(f"  {self.checkout.name}: {job}", flush=True)
        done = subprocess.run(
            [sys.executable, str(script), "--config", str(config), *overrides],
            env=environment, cwd=self.checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{job} of {self.checkout} failed:\n{done.stdout[-4000:]}")

    def train(self, corpus: Path, steps: int) -> None:
        """Trains the three models on `corpus`, which holds `video/` and `labelled/`."""
        for kind, job in RUNS.items():
            folder = "labelled" if kind == "policy" else "video"
            models = [f"gfdm={self.runs}/gfdm/model", f"gidm={self.runs}/gidm/model"]
            self.start(
                job,
                *(models if kind == "policy" else []),
                f"data.corpora.metaworld.path={corpus / folder}",
                f"data.manifest={self.runs / 'manifest' / folder}",
                "data.holdout=0.3",
                f"train.output={self.runs / kind}",
                f"train.steps={steps}",
                f"train.validate_every={steps // 2}",
                f"train.checkpoint_every={steps // 2}",
                "train.log_every=1",
                "train.threads=1",
                "tracking.wandb=false",
            )


@dataclass(frozen=True)
class Result:
    """All that a run computed."""

    code: str
    fingerprint: str
    figures: dict[str, float]
    """"split step name" -> figure."""
    weights: dict[str, np.ndarray[Any, Any]]

    @classmethod
    def of(cls, run: Path) -> Result:
        """Reads a complete run folder."""
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        figures = {
            f"{row['split']} {row['step']} {name}": value
            for row in rows
            if row["split"] in ("train", "validation")
            for name, value in row.items()
            if name not in ("split", "step") and not name.endswith(NOT_COMPARED)
        }
        weights = {
            f"{file.name} {name}": tensor
            for file in sorted((run / "model").rglob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        code = next(row["source"] for row in rows if row["split"] == "attempt")
        return cls(
            code, json.loads((run / "run_card.json").read_text())["data_fingerprint"], figures, weights
        )

    def differences(self, other: Result) -> list[str]:
        """One line for all that is not the same in `other`."""
        found = []
        if self.fingerprint != other.fingerprint:
            found.append(f"data fingerprint: {self.fingerprint}, there {other.fingerprint}")
        for name in sorted(self.figures.keys() | other.figures.keys()):
            here, there = self.figures.get(name), other.figures.get(name)
            # JSON keeps every bit of a float64; NaN would be a difference, and no run of these has one.
            if here != there:
                found.append(f"{name}: {here!r}, there {there!r}")
        for name in sorted(self.weights.keys() | other.weights.keys()):
            tensors = [side.weights.get(name) for side in (self, other)]
            if any(tensor is None for tensor in tensors) or tensors[0].tobytes() != tensors[1].tobytes():
                found.append(f"weights {name}")
        return found


@contextlib.contextmanager
def checkout_of(against: str, scratch: Path) -> Iterator[Path]:
    """The folder of the other side: `against` itself, or the files of that git revision."""
    if Path(against).is_dir():
        yield Path(against).resolve()
        return
    folder = scratch / "other_checkout"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(CHECKOUT), "archive", against], capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(
            f"{against} is neither a folder nor a git revision: {archive.stderr.decode().strip()}"
        )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    yield folder


def compare(against: str, steps: int, scratch: Path) -> int:
    """Trains on both sides and prints the table. Returns: the number of differences."""
    # Jobs leave complete runs as they are, so a kept folder saves the other side's second time, but never this one's.
    shutil.rmtree(scratch / "here", ignore_errors=True)
    with checkout_of(against, scratch) as other_checkout:
        sides = [Side(CHECKOUT, scratch / "here"), Side(other_checkout, scratch / "there")]
        for side in sides:
            side.runs.mkdir(exist_ok=True)
        corpus = scratch / "corpus"
        sides[0].start(
            "record_demos",
            "tasks=[drawer-close-v3,button-press-v3]",
            "episodes_per_task=6",
            "labelled_per_task=5",
            f"output={corpus}",
        )
        for side in sides:
            side.train(corpus, steps)
    count = 0
    print(
        f"\n{'run':8}{'figures':>9}{'tensors':>9}{'first loss':>22}{'last loss':>22}  data fingerprint  result"
    )
    for kind in RUNS:
        here, there = (Result.of(side.runs / kind) for side in sides)
        first, last = (here.figures[f"train {step} loss"] for step in (1, steps))
        found = here.differences(there)
        print(
            f"{kind:8}{len(here.figures):9}{len(here.weights):9}{first!r:>22}{last!r:>22}  {here.fingerprint:16}"
            f"  {f'{len(found)} DIFFERENT' if found else 'identical'}"
        )
        for line in found[:10]:
            print(f"    {line}")
        count += len(found)
    print(f"code: {here.code} here, {there.code} there")
    return count


def main() -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", default="HEAD", help="another checkout's folder, or a git revision")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder where corpus and runs are kept; the runs of the other side are used again as long as they lie there",
    )
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be 2 or more")
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        return 1 if compare(arguments.against, arguments.steps, arguments.keep.resolve()) else 0
    with tempfile.TemporaryDirectory(prefix="identical-losses-") as scratch:
        return 1 if compare(arguments.against, arguments.steps, Path(scratch)) else 0


if __name__ == "__main__":
    sys.exit(main())
