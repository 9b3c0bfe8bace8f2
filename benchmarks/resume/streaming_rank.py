"""One worker that reads a MosaicML streaming dataset, in that library's own virtual environment; it trains nothing.

Started by benchmarks/exact_resume.py with the environment variables of torch.distributed. Does what the library's
documentation asks for: a StreamingDataLoader, its state_dict() saved with each checkpoint, load_state_dict() at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import torch.distributed as distributed
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset


def write(folder: str, samples: int) -> None:
    """Writes a dataset whose sample k holds k."""
    with MDSWriter(out=folder, columns={"number": "int"}, size_limit=1 << 12) as out:
        for number in range(samples):
            out.write({"number": number})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=int, default=0)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--checkpoint-every", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kill-at", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.data, arguments.write)
        return
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo")
    size = arguments.batch // workers
    dataset = StreamingDataset(local=arguments.data, shuffle=True, batch_size=size)
    loader = StreamingDataLoader(dataset, batch_size=size, num_workers=0)
    saved = arguments.run / "checkpoint.json"
    step = 0
    if saved.exists():
        checkpoint = json.loads(saved.read_text())
        step = checkpoint["step"]
        loader.load_state_dict(checkpoint["loader"])
    with (arguments.run / f"seen_{workers}_{rank}.jsonl").open("a") as seen:
        for batch in loader:
            step += 1
            seen.write(
                json.dumps({"from": workers, "step": step, "samples": batch["number"].tolist()}) + "\n"
            )
            seen.flush()
            if step % arguments.checkpoint_every == 0:
                state = loader.state_dict()
                if rank == 0:
                    partial = saved.with_suffix(".part")
                    partial.write_text(json.dumps({"step": step, "loader": state}))
                    partial.replace(saved)
            distributed.barrier()  # as an update of the weights would be
            if step == arguments.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == arguments.steps:
                break


if __name__ == "__main__":
    main()
