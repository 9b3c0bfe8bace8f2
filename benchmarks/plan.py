"""The plan over ten million videos: time to open, memory, time of 1,024 random samples. Prints one table.

python benchmarks/plan.py [videos]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa

from defi_platform.data.ingest.probe_results import RESULT_SCHEMA
from defi_platform.data.manifest.quarantine import QUARANTINE_SCHEMA
from defi_platform.data.manifest.table import SCHEMA, Manifest, commit_corpus
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import PairRule

CORPORA = 2
MEASURE = "measure"


def make(folder: str, videos: int) -> None:
    """Writes a manifest of `videos` rows in two corpora, with ids, paths and texts of usual length."""
    for number in range(CORPORA):
        count = videos // CORPORA
        ids = pa.array(np.arange(count)).cast(pa.string())
        columns = {
            "corpus": pa.DictionaryArray.from_arrays(np.zeros(count, np.int16), [f"c{number}"]),
            "video_id": ids,
            "uri": pa.compute.binary_join_element_wise(
                "s3://bucket/corpus/videos/train/", ids, "/rgb.mp4", ""
            ),
            "text": pa.compute.binary_join_element_wise("put the object into container ", ids, ""),
            "split": pa.DictionaryArray.from_arrays(
                (np.arange(count) % 10 == 0).astype(np.int16), ["train", "validation"]
            ),
            "camera": pa.DictionaryArray.from_arrays(np.zeros(count, np.int16), ["main"]),
            "num_frames": np.full(count, 100, np.int32),
            "fps": np.full(count, 10, np.float32),
            "num_actions": np.zeros(count, np.int32),
            "first_frame": np.zeros(count, np.int32),
        }
        arrays = [columns.get(f.name, pa.nulls(count, f.type)) for f in SCHEMA]
        rows = pa.table(arrays, schema=SCHEMA).to_reader(4_000)
        empty = (schema.empty_table().to_reader() for schema in (QUARANTINE_SCHEMA, RESULT_SCHEMA))
        commit_corpus(folder, f"c{number}", rows, *empty, {})


def peak_mb() -> int:
    """Most memory this process has had resident; mapped files count."""
    # Not getrusage: its peak is inherited from the process that started this one.
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024


def measure(folder: str) -> None:
    """Opens and resolves in this process, and prints the rows of the table."""
    base = peak_mb()
    started = time.perf_counter()
    manifest = Manifest.open(folder)
    plan = Plan(manifest, {"c0": 1.0, "c1": 3.0}, PairRule(), seed=0)
    opened = time.perf_counter() - started
    ks = np.random.default_rng(0).integers(0, 10**10, 1024)
    plan.resolve_many(ks[:2])
    started = time.perf_counter()
    samples = plan.resolve_many(ks)
    resolved = time.perf_counter() - started
    peak = peak_mb()
    assert len(samples) == 1024
    print(f"| videos | {len(manifest):,} |")
    print(f"| open manifest and plan | {opened:.2f} s |")
    print(f"| 1,024 random samples | {resolved * 1e3:.1f} ms |")
    print(f"| peak memory of the process | {peak} MB (imports alone: {base} MB) |")


def main() -> int:
    """Makes the manifest, then measures in a process of its own."""
    if sys.argv[1:2] == [MEASURE]:
        measure(sys.argv[2])
        return 0
    videos = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        make(folder, videos)
        return subprocess.run([sys.executable, __file__, MEASURE, folder], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
