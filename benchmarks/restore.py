"""Bytes, requests, memory and CPU seconds that one rank needs to read a checkpoint of paper size back, and another checkout's.

python benchmarks/restore.py [--ranks 8] [--readers 8 6 16] [--s3-scale 32] [--against CHECKOUT]

The state has the names and sizes of the weights and both moments of the paper's GFDM. On disk its shards are sparse
files: whole in size, in the number of tensors and in what is hashed and copied, but their zeros come from no disk, so
seconds are those of the CPU. On S3 (moto) every tensor is divided by --s3-scale. Rank 1 is measured, in a process of
its own, and what the busiest rank would read is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("param", "exp_avg", "exp_avg_sq")
MEASURE, WRITE = "--measure", "--write"
BUCKET = "restore"
HERE = Path(__file__).resolve().parents[1]
Sizes = dict[str, int]


def paper_sizes() -> Sizes:
    """Name -> elements of each trained parameter of the paper's GFDM."""
    import torch

    from defi_models import presets
    from defi_models.gfdm import GFDM

    with torch.device("meta"):
        model = GFDM(presets.gfdm("paper"))
    return {name: one.numel() for name, one in model.named_parameters() if one.requires_grad}


def shares(sizes: Sizes, ranks: int) -> list[dict[str, tuple[int, int]]]:
    """Each rank's (start, stop) of the parameters that it holds: ZeRO 1 and 2 lay them behind one another and cut equally."""
    each = math.ceil(sum(sizes.values()) / ranks)
    found: list[dict[str, tuple[int, int]]] = [{} for _ in range(ranks)]
    position = 0
    for name, elements in sizes.items():
        for rank in range(position // each, (position + elements - 1) // each + 1):
            start, stop = max(position, rank * each), min(position + elements, (rank + 1) * each)
            found[rank][name] = (start - position, stop - position)
        position += elements
    return found


def sparse_shard(file: Path, share: dict[str, tuple[int, int]]) -> None:
    """Makes a safetensors file of zeros, in the order of keys that safetensors itself writes."""
    header, offset = {}, 0
    keys = {f"{kind}/{start}/{name}": stop - start for name, (start, stop) in share.items() for kind in KINDS}
    for key in sorted(keys):
        header[key] = {
            "dtype": "F32",
            "shape": [keys[key]],
            "data_offsets": [offset, offset + 4 * keys[key]],
        }
        offset += 4 * keys[key]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + offset)


def checkpoint_format() -> Any:
    """Module that knows the format, of the checkout that this process imports."""
    try:
        return importlib.import_module("defi_platform.train.checkpoint.format")
    except ImportError:  # a checkout from before the folder
        return importlib.import_module("defi_platform.train.checkpoints")


def write(run: str, sizes: Sizes, ranks: int, scratch: str) -> None:
    """Commits a checkpoint with the checkout's own format."""
    from defi_platform import storage

    checkpoints = checkpoint_format()
    if not storage.is_remote(run):

        def link(local: Path, uri: str) -> None:
            """In place of a copy, which would make holes bytes on the disk."""
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            os.link(local, uri)

        storage.put_file = link
    folder = storage.join(run, checkpoints.FOLDER, checkpoints.folder_name(1, "abcdef"))
    position = checkpoints.Position(1, 1, {"kind": "gfdm"}, {"adam_step": 1.0})
    for rank, share in enumerate(shares(sizes, ranks)):
        shard = Path(scratch) / f"shard_{rank:05d}_of_{ranks:05d}.safetensors"
        sparse_shard(shard, share)
        checkpoints.commit_shard(shard, folder, position)
        shard.unlink()


class Counts:
    """Files opened and S3 objects asked for, and the bytes that came."""

    def __init__(self) -> None:
        self.requests = self.bytes = 0
        self._before = self._read_calls()
        self._remote = False
        sys.addaudithook(self._opened)

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith((".safetensors", ".json")) and not self._remote:
            self.requests += 1

    @staticmethod
    def _read_calls() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    def count_maps(self, module: Any) -> None:
        """Counts the opens of a module that maps safetensors files: no audit event says so."""
        opened = getattr(module, "safe_open", None)
        if opened:

            def safe_open(*arguments: Any, **options: Any) -> Any:
                self.requests += 1
                return opened(*arguments, **options)

            module.safe_open = safe_open

    def count_s3(self) -> None:
        """Counts what S3 answers, in place of files."""
        from s3fs.core import S3FileSystem

        self._remote = True
        call = S3FileSystem._call_s3

        async def counted(fs: Any, method: str, *arguments: Any, **options: Any) -> Any:
            answer = await call(fs, method, *arguments, **options)
            self.requests += 1
            # An object larger than a block is asked for whole first, for its length, and that answer is not read.
            if method == "get_object" and (
                "Range" in options or answer["ContentLength"] <= fs.default_block_size
            ):
                self.bytes += int(answer["ContentLength"])
            return answer

        S3FileSystem._call_s3 = counted

    def total_bytes(self) -> int:
        """Bytes of all answers, or of all read calls; pages of mapped files are not among them."""
        return self.bytes if self._remote else self._read_calls() - self._before


def _memory(what: str) -> int:
    """Bytes of this process, by a name of /proc/self/status."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0])


def measure(run: str, sizes: Sizes, rank: int, ranks: int) -> dict[str, float]:
    """Reads as one rank does that resumes. Returns: what it took."""
    import torch

    from defi_platform import storage

    checkpoints = checkpoint_format()
    share = shares(sizes, ranks)[rank]
    own = 4 * len(KINDS) * sum(stop - start for start, stop in share.values())
    room = torch.empty(max(sizes.values()))
    counts = Counts()
    if storage.is_remote(run):
        counts.count_s3()
    counts.count_maps(checkpoints)
    # The peak of before, of imports, is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    cpu, clock = time.process_time(), time.monotonic()
    (found,) = checkpoints.committed(run)
    busiest = math.nan
    if hasattr(checkpoints, "Reader"):  # a checkout from before the index
        with checkpoints.Reader(found) as reader:
            for name, (start, stop) in share.items():
                for kind in KINDS:
                    # It restored the whole weights on every rank, and took its share of the rest.
                    room[: stop - start].copy_(reader.read(kind, name)[start:stop])
            for name in sizes.keys() - share.keys():
                for kind in KINDS:
                    reader.read(kind, name)
    else:
        from defi_platform.train.checkpoint.read import Reader, requests
        from defi_platform.train.engine.sharded_state import Span

        reader = Reader(found)
        spans = [
            [Span(kind, name, *part) for name, part in of_rank.items() for kind in KINDS]
            for of_rank in shares(sizes, ranks)
        ]
        elements = 0
        for _, values in reader.spans(spans[rank]):
            room[: len(values)].copy_(values)
            elements += len(values)
        assert 4 * elements == own
    took = {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - clock}
    took["peak"] = _memory("VmHWM") - before
    took |= {"own": own, "bytes": counts.total_bytes(), "requests": counts.requests}
    if not hasattr(checkpoints, "Reader"):
        asked = [sum(one.end - one.begin for one in requests(reader.index, part)) for part in spans]
        of_own = [sum(4 * (span.stop - span.start) for span in part) for part in spans]
        busiest = max(read / need for read, need in zip(asked, of_own, strict=True))
    return took | {"busiest": busiest}


@contextlib.contextmanager
def s3() -> Iterator[None]:
    """Runs a moto server with an empty bucket, which this process and its children find by their environment."""
    sys.path.append(str(HERE / "tests" / "data"))
    import boto3
    from s3_server import s3_server

    with s3_server() as endpoint:
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield


def run_here(checkout: Path, *arguments: str) -> dict[str, float]:
    """Runs this script as part of a checkout. Returns: what it has measured."""
    paths = {"PYTHONPATH": f"{checkout / 'platform'}{os.pathsep}{checkout}"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(
        command, env=os.environ | paths, check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    found: dict[str, float] = json.loads(done.rsplit("measured ", 1)[1]) if "measured " in done else {}
    return found


def table(
    title: str, run: str, sizes: Sizes, given: argparse.Namespace, checkouts: dict[str, Path], folder: str
) -> None:
    """Prints what each checkout needs."""
    state = Path(folder) / "state.json"
    state.write_text(json.dumps(sizes))
    total = 4 * len(KINDS) * sum(sizes.values())
    print(f"\n{title}: {total / 1e9:.2f} GB in {given.ranks} shards, {len(sizes)} parameters\n")
    print(
        "| checkout | ranks that read | own share GB | read GB | read / share | of the busiest rank | requests | "
        "peak MB | CPU s | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, checkout in checkouts.items():
        there = f"{run}/{name}"
        run_here(checkout, WRITE, there, str(state), str(given.ranks), folder)
        for readers in given.readers:
            took = run_here(checkout, MEASURE, there, str(state), "1", str(readers))
            busiest = "-" if math.isnan(took["busiest"]) else f"{took['busiest']:.2f}"
            print(
                f"| {name} | {readers} | {took['own'] / 1e9:.3f} | {took['bytes'] / 1e9:.3f} | "
                f"{took['bytes'] / took['own']:.2f} | {busiest} | {took['requests']:,.0f} | {took['peak'] / 1e6:.0f} | {took['cpu_s']:.1f} | "
                f"{took['wall_s']:.1f} |",
                flush=True,
            )
            if name != "here":
                break  # it reads everything whatever the number of ranks


def main() -> int:
    """Prints a table for a disk and one for S3."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8, help="that have written the checkpoint")
    parser.add_argument("--readers", type=int, nargs="+", default=[8, 6, 16], help="ranks that read it")
    parser.add_argument("--s3-scale", type=int, default=32, help="divides the tensors on S3")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument(WRITE, nargs=4, help=argparse.SUPPRESS)
    parser.add_argument(MEASURE, nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        run, state, ranks, scratch = given.write
        write(run, json.loads(Path(state).read_text()), int(ranks), scratch)
        return 0
    if given.measure:
        run, state, rank, ranks = given.measure
        print(
            "measured " + json.dumps(measure(run, json.loads(Path(state).read_text()), int(rank), int(ranks)))
        )
        return 0
    sys.path[:0] = [str(HERE), str(HERE / "platform")]
    checkouts = {"here": HERE}
    if given.against:
        checkouts["there"] = given.against.resolve()
    sizes = paper_sizes()
    with tempfile.TemporaryDirectory() as folder:
        table("Disk", f"{folder}/run", sizes, given, checkouts, folder)
    small = {name: max(1, elements // given.s3_scale) for name, elements in sizes.items()}
    with tempfile.TemporaryDirectory() as folder, s3():
        table(
            f"S3 (moto), tensors divided by {given.s3_scale}",
            f"s3://{BUCKET}",
            small,
            given,
            checkouts,
            folder,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
