"""A process group of two processes, without Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from defi_platform.train.engine.deepspeed_engine import prepare_process


def run_on_two_ranks(work: Callable[[], None], store: Path) -> None:
    """Calls `work`, a function of a module, on both at once.

    Args:
        store: file by which they find each other; not there yet.
    Raises: what a rank raises.
    """
    multiprocessing.start_processes(_rank, (work, store), nprocs=2, start_method="spawn")


def _rank(rank: int, work: Callable[[], None], store: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    prepare_process(use_gpu=False, threads=1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    work()
    # Nobody leaves while the other still reads.
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush(), sys.stderr.flush()
    # DeepSpeed keeps the groups, so gloo's threads live on, and one that lets go of a tensor while Python shuts down
    # aborts the process (pytorch/pytorch#38228). Ray's workers end without shutting Python down too.
    os._exit(0)
