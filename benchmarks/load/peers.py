"""The peers' own servers around the policy that sleeps, each a process of its own that prints its port.

    python benchmarks/load/peers.py vla-eval BATCH | openpi FOLDER

vla-eval is the package of PyPI. openpi's server is not on PyPI: FOLDER is a checkout of
Physical-Intelligence/openpi, of which one file is run as it is.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from defi_platform.data.decode.resize import resize
from load import wires

FIXED_S, EACH_S = map(float, os.environ.get("POLICY_TIMES", "0.020,0.0006").split(","))
"""Of a forward pass, and of each observation in it; benchmarks/serving.py sets them."""


def sleep_like_a_policy(observations: int) -> None:
    """20 ms and 0.6 ms per observation: a forward pass on a device that leaves the CPU alone."""
    time.sleep(FIXED_S + EACH_S * observations)


def see(images: Mapping[str, np.ndarray]) -> None:
    """Resizes pictures as our server does, if the benchmark asks that of the peers' policies as well."""
    if os.environ.get("PEERS_RESIZE") == "True":
        np.stack([resize(np.asarray(image), wires.IMAGE_SIZE) for image in images.values()])


def chunk(state: Any) -> np.ndarray:
    """(CHUNK, ACTION_DIM) float32: the state in every row, so that an answer shows whose it is."""
    return np.tile(np.asarray(state, np.float32)[: wires.ACTION_DIM], (wires.CHUNK, 1))


def vla_eval(batch: int) -> None:
    """vla-eval's model server, which batches up to `batch` observations."""
    import anyio
    from vla_eval.model_servers.predict import PredictModelServer
    from vla_eval.model_servers.serve import serve_async

    class Sleeper(PredictModelServer):
        def predict_batch(self, obs_batch: Any, ctx_batch: Any) -> list[dict[str, Any]]:
            for each in obs_batch:
                see(each["images"])
            sleep_like_a_policy(len(obs_batch))
            return [{"actions": chunk(each["states"])} for each in obs_batch]

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            port = await tasks.start(serve_async, Sleeper(max_batch_size=batch), "127.0.0.1", 0)
            print(f"port {port}", flush=True)

    anyio.run(run)


def openpi(folder: str) -> None:
    """openpi's websocket server, run from its checkout."""
    import socket

    file = Path(folder) / "src/openpi/serving/websocket_policy_server.py"
    spec = importlib.util.spec_from_file_location("websocket_policy_server", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Sleeper:
        def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
            see({name: value for name, value in observation.items() if "images" in name})
            sleep_like_a_policy(1)
            return {"actions": chunk(observation["observation/state"])}

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def announce() -> None:
        while True:
            time.sleep(0.05)
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                continue
            print(f"port {port}", flush=True)
            return

    threading.Thread(target=announce, daemon=True).start()
    module.WebsocketPolicyServer(Sleeper(), "127.0.0.1", port, {"policy": "sleeps"}).serve_forever()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    if sys.argv[1] == "openpi":
        openpi(sys.argv[2])
    else:
        vla_eval(int(sys.argv[2]))
