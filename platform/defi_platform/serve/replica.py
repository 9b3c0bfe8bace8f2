"""A policy on one set of resources: loads a policy folder and answers observations in batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from defi_platform.serve.batching import Batched, GreedyBatcher
from defi_platform.serve.observation import Answer, Observation, PolicySpec

log = logging.getLogger("ray.serve")


class PolicyReplica:
    """Deployment that holds the model. Its callers are gateways; the batch spans their clients."""

    def __init__(
        self, policy: str, *, max_batch_size: int = 8, threads: int | None = None, gpu: bool = False
    ) -> None:
        """Raises: CheckpointError for a folder that holds no complete policy."""
        # Only here: whoever deploys this class need not wait for the model library to be imported.
        from defi_platform.serve.policy_folder import load_policy, policy_spec

        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device("cuda" if gpu else "cpu")
        self._policy = load_policy(policy).to(self._device).eval()
        self._spec = policy_spec(self._policy.config, policy)
        self._batcher: GreedyBatcher[Observation, np.ndarray] = GreedyBatcher(self.infer, max_batch_size)
        self._warm_up()

    async def spec(self) -> PolicySpec:
        return self._spec

    async def act(self, observation: Observation) -> Answer:
        """Answers one observation, together with whatever else is waiting."""
        batched: Batched[np.ndarray] = await self._batcher.submit(observation)
        return Answer(batched.result, batched.queue_ms, batched.infer_ms, batched.batch_size)

    def infer(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        """One forward pass. Every observation draws its noise from its own seed, so an action does not depend
        on what else is in the batch (up to the rounding of batched matrix products).

        Returns: one (chunk, A) float32 array per observation.
        """
        batch: dict[str, object] = {
            "images": torch.from_numpy(np.stack([o.images for o in observations])).to(self._device),
            "text": [o.prompt for o in observations],
        }
        if self._spec.state_dim:
            states = np.stack([o.state for o in observations if o.state is not None])
            batch["proprio"] = torch.from_numpy(states).to(self._device)
        # CPU generators give the same noise on every device.
        generators = [torch.Generator().manual_seed(o.seed) for o in observations]
        with torch.inference_mode():
            actions = self._policy.act(batch, generator=generators)
        return list(actions.float().cpu().numpy())

    def _warm_up(self) -> None:
        """Allocations and lazy initialisation happen here, not in the first robot's first request."""
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
