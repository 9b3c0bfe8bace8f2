"""A policy folder as a function from observations to actions: precision, compilation, buffers and warm-up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from defi_models.act.graphs import ActGraphs
from defi_models.act.package import ActPackage
from defi_models.errors import ModelFolderError
from defi_models.policy import DeFIPolicy
from defi_platform import storage
from defi_platform.config import InferenceConfig, ServedActingConfig
from defi_platform.errors import ConfigError, ServeError
from defi_platform.serve.inference.forward_thread import WarmUp
from defi_platform.serve.observation import Observation, PolicySpec
from defi_platform.serve.policy_folder import load_policy, policy_spec
from defi_platform.storage.scratch import native_scratch

log = logging.getLogger("ray.serve")

WARM_UP_S = 120.0
"""Seconds after which the warm-up of sizes that need none (no compilation, no fixed shape) ends."""


class PolicyForward:
    """Runs a policy over batches. All passes, the warm-up included, belong to one thread."""

    def __init__(
        self,
        folder: str,
        *,
        name: str | None = None,
        gpu: bool = False,
        threads: int | None = None,
        max_batch_size: int = 64,
        settings: InferenceConfig | None = None,
        acting: ServedActingConfig | None = None,
        shape: int | None = None,
    ) -> None:
        """Loads the policy.

        Args:
            folder: local or remote.
            name: of the policy among clients; the folder when None.
            gpu: whether to run on the process's GPU.
            threads: of PyTorch; its own choice when None.
            max_batch_size: observations per pass, at most.
            settings: precision, compilation, determinism, cached prompts.
            acting: settings of acting in place of the folder's.
            shape: the one size of every pass; None: see `InferenceConfig.deterministic`.

        Raises:
            CheckpointError: the folder holds no complete policy.
            ConfigError: settings of acting, or the package, do not fit it.
        """
        settings = settings or InferenceConfig()
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device("cuda" if gpu else "cpu")
        if settings.deterministic:
            _fix_kernels()
            shape = shape or (max_batch_size if gpu else 1)
        policy = load_policy(folder, acting).to(self._device, getattr(torch, settings.dtype)).eval()
        policy.hold_texts(settings.prompt_cache)
        if settings.package:
            package = _package(settings.package, policy)
            policy.replay(package)
            shape = package.batch
        self.spec: PolicySpec = policy_spec(policy, name or folder)
        """The policy's inputs and outputs."""
        self.sizes = _sizes(shape or max_batch_size, fixed=shape is not None)
        """Sizes of warm passes, ascending; where passes are padded, there are no others."""
        self._padded = shape is not None or settings.compile != "none"
        if self._padded:
            # Another length of the texts would be another shape.
            policy.pad_texts()
        _speed_up(policy, settings.compile)
        self._policy: DeFIPolicy = policy
        self._buffers = _Buffers(self.spec, self.sizes[-1], pinned=gpu)

    @property
    def probe(self) -> Observation:
        """An observation that the policy must be able to answer."""
        height, width = self.spec.image_size
        return Observation(
            images=np.zeros((len(self.spec.cameras), height, width, 3), np.uint8),
            state=np.zeros(self.spec.state_dim, np.float32) if self.spec.state_dim else None,
            prompt="warm up",
            seed=0,
        )

    def __call__(self, observations: Sequence[Observation]) -> list[NDArray[np.float32]]:
        """Runs one forward pass.

        Every observation draws its noise from its own seed, so an action does not depend on what else is in
        the batch: up to the rounding of batched matrix products, or bit for bit where every pass has one shape.

        Returns:
            One (chunk, A) float32 array per observation, in raw units.
        """
        count = len(observations)
        size = next(size for size in self.sizes if size >= count) if self._padded else count
        # Rows of padding repeat the first observation: every value in them is one that the policy can take.
        rows = [*observations, *(observations[0] for _ in range(size - count))]
        images, states = self._buffers.filled(rows)
        batch: dict[str, object] = {
            "images": images.to(self._device, non_blocking=True),
            "text": [row.prompt for row in rows],
        }
        if states is not None:
            batch["proprio"] = states.to(self._device, non_blocking=True)
        # CPU generators give the same noise on every device.
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        with torch.inference_mode():
            actions = self._policy.act(batch, generator=generators)
        return list(actions[:count].float().cpu().numpy())

    def warm_up(self) -> WarmUp:
        """Runs every size twice and takes the faster run's time.

        Takes allocations, compilation and lazy initialisation out of the first robots' requests. A size that does
        not fit into the GPU's memory lowers the largest one. A CPU without compilation has nothing to prepare for
        each size: the two smallest load the libraries and show what a pass and each observation in it cost.
        """
        seconds: dict[int, float] = {}
        began = time.monotonic()
        sizes = self.sizes if self._padded or self._device.type != "cpu" else self.sizes[:2]
        for size in sizes:
            if not self._padded and time.monotonic() - began > WARM_UP_S:
                log.info(
                    "policy %s: no warm-up of batches beyond %d: it took long", self.spec.policy, max(seconds)
                )
                return WarmUp(seconds, self.sizes[-1])
            try:
                for _ in range(2):
                    started = time.perf_counter()
                    self([replace(self.probe, seed=number) for number in range(size)])
                    took = time.perf_counter() - started
                    seconds[size] = min(took, seconds.get(size, took))
            except torch.cuda.OutOfMemoryError as error:
                if not seconds:
                    raise ServeError(
                        f"policy {self.spec.policy}: a forward pass of {size} observation(s) does not fit into the "
                        "GPU's memory. Set model.dtype=bfloat16, a larger share of a GPU (replica_gpus) or, with "
                        "model.deterministic, a smaller max_batch_size."
                    ) from error
                largest = max(seconds)
                log.warning(
                    "policy %s: batches of %d do not fit into the GPU's memory; at most %d are made (max_batch_size)",
                    self.spec.policy,
                    size,
                    largest,
                )
                return WarmUp(seconds, largest)
        log.info("policy %s on %s: warm, passes take %s s", self.spec.policy, self._device, seconds)
        return WarmUp(seconds, self.sizes[-1])


class _Buffers:
    """The inputs of a pass in memory that is allocated once, pinned for a GPU."""

    def __init__(self, spec: PolicySpec, rows: int, *, pinned: bool) -> None:
        height, width = spec.image_size
        self._spec = spec
        self._images = torch.zeros(
            (rows, len(spec.cameras), height, width, 3), dtype=torch.uint8, pin_memory=pinned
        )
        self._states = torch.zeros((rows, spec.state_dim)) if spec.state_dim else None

    def filled(self, rows: Sequence[Observation]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inputs of a batch; valid until the next call.

        Returns:
            Images (n, V, H, W, 3) uint8 and states (n, P) float32, as the policy reads them; None where it does not.
        """
        images = self._images[: len(rows)]
        view = images.numpy()
        for index, row in enumerate(rows):
            view[index] = row.images
        if self._states is None:
            return images, None
        states = self._states[: len(rows)]
        for index, row in enumerate(rows):
            states.numpy()[index] = row.state
        if self._spec.state is not None:
            return images, torch.from_numpy(self._spec.state.apply(states.numpy()))
        return images, states


def _package(uri: str, policy: DeFIPolicy) -> ActPackage:
    """Raises: ConfigError: the file is absent, or no package of this policy."""
    try:
        # The loader unpacks the package, weights and all, and replicas may be killed.
        with storage.local_copy(uri) as local, native_scratch("package"):
            return ActPackage(local, policy)
    except (OSError, ModelFolderError) as error:
        raise ConfigError(f"model.package={uri}: {error}") from error


def _speed_up(policy: DeFIPolicy, mode: str) -> None:
    """Compiles the policy's blocks and records its passes, as `InferenceConfig.compile` says.

    Raises:
        ConfigError: graphs of a policy that is on no GPU.
    """
    on_gpu = policy.device.type == "cuda"
    if mode == "graphs" and not on_gpu:
        raise ConfigError(
            "model.compile=graphs replays CUDA graphs, but the replica has no GPU. Set replica_gpus=1, or another "
            "model.compile."
        )
    # One graph around the whole pass takes the place of one around each compiled block.
    compiled = {
        "default": "default",
        "reduce-overhead": "default",
        "max-autotune": "max-autotune-no-cudagraphs",
    }
    if mode in compiled:
        policy.compile_parts(mode=compiled[mode], dynamic=False)
    if on_gpu and mode in ("graphs", "reduce-overhead", "max-autotune"):
        ActGraphs(policy)


def _sizes(largest: int, *, fixed: bool) -> tuple[int, ...]:
    """1, 2, 4, ... and the largest itself; only that where it is fixed."""
    if fixed:
        return (largest,)
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return (*powers, largest)


def _fix_kernels() -> None:
    """Has PyTorch choose the same kernels every time, as far as there are such kernels."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
