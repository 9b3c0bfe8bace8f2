"""CUDA graphs of acting: one launch per chunk in place of thousands, one graph per batch size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from defi_models.act.inputs import ActInputs
from defi_models.inputs.acting import Acting
from defi_models.policy import DeFIPolicy

_WARM_UP_RUNS = 3
"""Before a capture, outside of it: libraries choose their kernels and allocate."""

Run: TypeAlias = Callable[[ActInputs], Tensor]
Recorder: TypeAlias = Callable[[Run, ActInputs], tuple[Callable[[], object], Tensor]]
"""(what to run, inputs that stay where they are) -> (what computes it again from them, the output that it fills)."""


class _Held(NamedTuple):
    inputs: ActInputs
    replay: Callable[[], object]
    output: Tensor


class ActGraphs:
    """`act_on` of a policy, recorded at the first call with inputs of new shapes and replayed from then on.

    The policy's weights must stay where they are; other settings of acting, or a policy that was moved as a whole, are
    recorded anew. Texts are padded to one length, so that the shapes depend on the batch size alone. Threads act one
    after the other. A copy of the policy replays nothing.
    """

    def __init__(self, policy: DeFIPolicy, recorder: Recorder | None = None) -> None:
        """Has the policy's `act` replay; `policy.replay(None)` ends it.

        Args:
            policy: on the device where it stays.
            recorder: records and replays; None: as CUDA graphs.

        Raises:
            ValueError: When the policy lies on no CUDA device and no recorder is given.
        """
        if recorder is None and policy.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a policy on a CUDA device; it is on '{policy.device}'.")
        policy.pad_texts()
        self._policy = policy
        self._record: Recorder = recorder or CudaRecorder()
        self._held: dict[tuple[Acting, int, tuple[tuple[Any, ...], ...]], _Held] = {}
        self._lock = threading.Lock()
        policy.replay(self)

    @property
    def recorded(self) -> int:
        """Number of graphs."""
        return len(self._held)

    def __call__(self, inputs: ActInputs) -> Tensor:
        """The chunk before `acting.applied`, float32 (B, H, A); see `DeFIPolicy.act_on`."""
        given = inputs.tensors()
        shapes = tuple((name, tuple(each.shape), each.dtype) for name, each in given.items())
        head = self._policy.adapter.head.action_out
        key = (self._policy.acting, head.weight.data_ptr(), shapes)
        with self._lock:
            if key not in self._held:
                own = inputs._replace(**{name: each.clone() for name, each in given.items()})
                self._held[key] = _Held(own, *self._record(self._policy.act_on, own))
            held = self._held[key]
            for name, tensor in held.inputs.tensors().items():
                tensor.copy_(given[name])
            held.replay()
            return held.output.clone()  # the next replay fills the same memory


class CudaRecorder:
    """Records CUDA graphs whose temporary memory is shared: they run one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run, inputs: ActInputs) -> tuple[Callable[[], object], Tensor]:
        """Captures `run(inputs)`; see `Recorder`."""
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP_RUNS):
                run(inputs)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run(inputs)
        return graph.replay, output
