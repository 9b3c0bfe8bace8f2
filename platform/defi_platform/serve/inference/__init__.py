"""From observations to actions: the batching service and the policy behind it."""
