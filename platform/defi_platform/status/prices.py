"""Cost of runs, from the prices of nodes in a cluster's values (cluster/values/*.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from defi_platform.config.loader import read_yaml
from defi_platform.errors import ConfigError


@dataclass(frozen=True)
class Prices:
    """Prices per hour, in US dollars, of what one worker holds of a node."""

    gpu: float | None = None
    """Of a GPU with its share of its node."""
    train_cpu: float | None = None
    """Of a CPU of a train node without GPUs."""
    decode_cpu: float | None = None

    def cost(self, hours: Mapping[str, float]) -> float | None:
        """Dollars of resource-hours; None where they include one without a price.

        Args:
            hours: by Ray resource, see `RunStatus.hours`.
        """
        total = 0.0
        # A GPU's price is that of its node divided by its GPUs: the CPUs beside it are paid for.
        priced = ["GPU"] if "GPU" in hours else ["CPU"]
        for resource in [*priced, "decode CPU"]:
            if resource not in hours:
                continue
            if resource == "GPU":
                price = self.gpu
            else:
                price = self.train_cpu if resource == "CPU" else self.decode_cpu
                if price is None and resource == "decode CPU" and "GPU" in hours:
                    price = 0.0  # without nodes of their own they decode on the nodes of the GPUs
            if price is None:
                return None
            total += price * hours[resource]
        return total


def read_prices(path: str) -> Prices:
    """Prices of a values file.

    Where several types of nodes have a resource, the dearest counts: the cost is an upper bound.

    Args:
        path: YAML file with `nodes: {NAME: {role, cpus, gpus, price}}`; a local one may extend others.

    Raises: ConfigError when it has no prices or is of another form.
    """
    values = read_yaml(Path(path))
    try:
        nodes = [node for node in values["nodes"].values() if node.get("price") is not None]
    except (KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no values file ({error}): it needs `nodes: {{NAME: {{price: 1.0}}}}`."
        ) from error
    if not nodes:
        raise ConfigError(f"no node of {path} has a price. Set nodes.NAME.price, in US dollars per hour.")

    def dearest(resource: str, role: str | None, gpus: bool) -> float | None:
        return max(
            (
                float(node["price"]) / float(node[resource])
                for node in nodes
                if node.get(resource) and bool(node.get("gpus")) == gpus and role in (None, node.get("role"))
            ),
            default=None,
        )

    try:
        return Prices(
            dearest("gpus", None, True), dearest("cpus", "train", False), dearest("cpus", "decode", False)
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: price, cpus and gpus of each node are numbers ({error}).") from error
