"""A policy on one set of resources: loads a policy folder and answers observations in batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from defi_platform.serve.batching import GreedyBatcher
from defi_platform.serve.observation import Answer, Observation, PolicySpec

log = logging.getLogger("ray.serve")


class PolicyReplica:
    """The deployment that holds the model; its callers are gateways, and a batch spans their clients."""

    def __init__(
        self, policy: str, *, max_batch_size: int = 8, threads: int | None = None, gpu: bool = False
    ) -> None:
        """Loads the policy and runs it once.

        Args:
            policy: folder, local or remote.
            max_batch_size: observations per forward pass, at most.
            threads: of PyTorch; its own choice when None.
            gpu: whether to run on the replica's GPU.

        Raises:
            CheckpointError: the folder holds no complete policy.
        """
        # Only here: whoever deploys this class need not wait for the model library to be imported.
        from defi_platform.serve.policy_folder import load_policy, policy_spec

        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device("cuda" if gpu else "cpu")
        self._policy = load_policy(policy).to(self._device).eval()
        self._spec = policy_spec(self._policy, policy)
        self._batcher = GreedyBatcher(self.infer, max_batch_size)
        self._warm_up()

    async def spec(self) -> PolicySpec:
        """The policy's inputs and outputs."""
        return self._spec

    async def act(self, observation: Observation) -> Answer:
        """Answers one observation, together with whatever else is waiting."""
        return await self._batcher.submit(observation)

    def infer(self, observations: Sequence[Observation]) -> list[NDArray[np.float32]]:
        """Runs one forward pass.

        Every observation draws its noise from its own seed, so an action does not depend on what else is in
        the batch (up to the rounding of batched matrix products).

        Returns:
            One (chunk, A) float32 array per observation, in raw units.
        """
        batch: dict[str, object] = {
            "images": torch.from_numpy(np.stack([o.images for o in observations])).to(self._device),
            "text": [o.prompt for o in observations],
        }
        if self._spec.state_dim:
            states = np.stack([o.state for o in observations if o.state is not None])
            if self._spec.state is not None:
                states = self._spec.state.apply(states)
            batch["proprio"] = torch.from_numpy(states).to(self._device)
        # CPU generators give the same noise on every device.
        generators = [torch.Generator().manual_seed(o.seed) for o in observations]
        with torch.inference_mode():
            actions = self._policy.act(batch, generator=generators)
        return list(actions.float().cpu().numpy())

    def _warm_up(self) -> None:
        """Takes allocations and lazy initialisation out of the first robot's first request."""
        height, width = self._spec.image_size
        dummy = Observation(
            images=np.zeros((len(self._spec.cameras), height, width, 3), np.uint8),
            state=np.zeros(self._spec.state_dim, np.float32) if self._spec.state_dim else None,
            prompt="warm up",
            seed=0,
        )
        started = time.perf_counter()
        self.infer([dummy])
        seconds = time.perf_counter() - started
        log.info("policy %s on %s: warm after %.2f s", self._spec.policy, self._device, seconds)
