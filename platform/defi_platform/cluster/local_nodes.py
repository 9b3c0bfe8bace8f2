"""Nodes of the cluster on one machine (cluster/local.py), which Ray's autoscaler starts and ends: raylets of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE


class LocalNodes(FakeMultiNodeProvider):
    """Ray's provider of nodes on this machine, with a session folder for each node.

    With Ray's own one all nodes share the head's. A node that joins then unpacks the code of a job once more into the
    folder from which workers of another node are importing it.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: dict[str, int], labels: Any
    ) -> None:
        amounts: dict[str, Any] = dict(resources)
        with self.lock:
            node_id = self._next_hex_node_id()  # type: ignore[no-untyped-call]
            params = RayParams(
                gcs_address=self._gcs_address,
                redis_address=self._gcs_address,
                # Any free ports: nodes are neighbours here.
                min_worker_port=0,
                max_worker_port=0,
                dashboard_agent_listen_port=0,
                num_cpus=amounts.pop("CPU", 0),
                num_gpus=amounts.pop("GPU", 0),
                object_store_memory=amounts.pop("object_store_memory", None),
                resources=amounts,
                labels=labels,
                temp_dir=str(Path(self.provider_config["folder"]) / f"n{int(node_id[-5:])}"),
                env_vars={
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
                    "RAY_CLOUD_INSTANCE_ID": node_id,
                    "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
                    ray_constants.RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(amounts),
                    ray_constants.LABELS_ENVIRONMENT_VARIABLE: json.dumps(labels),
                },
            )
            node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
            self._nodes[node_id] = {"tags": {**tags, TAG_RAY_NODE_NAME: node_id}, "node": node}  # type: ignore[dict-item]

    def _terminate_node(self, node: Any) -> None:
        super()._terminate_node(node)  # type: ignore[no-untyped-call]
        # Its copy of the jobs' code; the logs stay until the next start of the cluster.
        shutil.rmtree(Path(node["node"].get_session_dir_path()) / "runtime_resources", ignore_errors=True)
