"""Acting compiled ahead into one file (AOTInductor), which runs without PyTorch's compiler."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from defi_models.act.inputs import ActInputs, gather
from defi_models.errors import InputError, ModelFolderError
from defi_models.policy import DeFIPolicy
from defi_models.pretrained.configuration import to_mapping

_KEY = "defi_act"
"""Of the package's metadata: what it was made for, as JSON."""
_TEXT = "open the drawer"
_MAKE = "Make it with jobs/export_model.py package.path=FILE.pt2, on such a machine."
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of a compiled action, as a share of the chunk's largest, both normalised, so that each dimension counts whatever its unit:
kernels add up in another order."""


class ActPackage:
    """`act_on` of one policy, for one batch size: `policy.replay(ActPackage(path, policy))`.

    The package has the weights, the noise levels and the statistics of the actions in it; texts are encoded and noise is
    drawn by the policy, as always.
    """

    def __init__(self, path: str | Path, policy: DeFIPolicy) -> None:
        """Reads a package.

        Args:
            path: of the .pt2 file.
            policy: that it was made of, on the same kind of device and in the same precision; its texts are padded.

        Raises:
            ModelFolderError: When the file is no such package, or of another policy, precision or device.
        """
        policy.pad_texts()
        self._policy, self._statistics = policy, policy.statistics
        self.made_for = _read(path)
        wanted = _made_for(policy, self.batch)
        if changed := [key for key in wanted if wanted[key] != self.made_for.get(key)]:
            both = "; ".join(f"{key}: {self.made_for.get(key)} there, {wanted[key]} here" for key in changed)
            raise ModelFolderError(
                f"{path} was made of another policy or for another use ({both}). Make it again."
            )
        try:
            self._run = torch._inductor.aoti_load_package(str(path))
        except RuntimeError as error:
            raise ModelFolderError(f"{path} cannot be loaded on this machine ({error}). {_MAKE}") from error

    @property
    def batch(self) -> int:
        """Observations of a pass."""
        return int(self.made_for["batch"])

    def __call__(self, inputs: ActInputs) -> Tensor:
        """The chunk before `acting.applied`, float32 (B, H, A).

        Raises:
            InputError: For another batch size, or when the policy's settings of acting or statistics have changed.
        """
        batch, acting = self.batch, self._policy.acting
        made_for = (self.made_for["steps"], self.made_for["sigma_min"])
        if made_for != (acting.steps, acting.sigma_min) or self._policy.statistics is not self._statistics:
            raise InputError(
                "acting or statistics: the policy's have changed since this package was made, and it has those of then in "
                "it. Make it again, or act without it: policy.replay(None)."
            )
        if len(inputs.images) != batch:
            raise InputError(
                f"images: got a batch of {len(inputs.images)}; this package was made for one of {batch}. Make one for "
                "each size that is asked for."
            )
        chunk: Tensor = self._run(**_tensors(inputs))
        return chunk


def write_package(policy: DeFIPolicy, path: str | Path, batch: int = 1) -> float:
    """Compiles `act_on` for the policy's device, precision and settings of acting; it takes minutes.

    The package is run once beside the policy, on other inputs than those that it was compiled with.

    Args:
        policy: in eval mode; its texts are padded from now on.
        path: of the file, ending in .pt2.
        batch: observations of a chunk's pass.

    Returns:
        Largest difference of an action from the policy's, as a share of the largest action, both normalised.

    Raises:
        ModelFolderError: When there is no C++ compiler, PyTorch cannot compile it, or the compiled code computes
            something else.
    """
    policy.pad_texts()
    inputs = _tensors(_inputs(policy, batch, seed=0))
    options = {
        "aot_inductor.metadata": {_KEY: json.dumps(_made_for(policy, batch))},
        # Otherwise sums over threads have room for as many as there are here, and a server with more writes past it.
        "cpp.dynamic_threads": True,
    }
    try:
        # The compiler keeps all that it makes, with the weights in it: here only while it is needed.
        with torch.no_grad(), fresh_cache(dir=str(Path(path).parent)):
            program = torch.export.export(_ActOn(policy), (), kwargs=inputs)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:  # torch's compilers raise families of their own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelFolderError(
            f"acting cannot be compiled here ({first}). It needs a C++ compiler (g++), and on a GPU nvcc."
        ) from error
    other = _inputs(policy, batch, seed=1)
    chunks = policy.act_on(other), ActPackage(path, policy)(other)
    expected, found = map(policy.action_normalizer.normalize, chunks)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE[policy.dtype]:
        Path(path).unlink()
        raise ModelFolderError(
            f"the compiled code acts otherwise than the policy: by {difference:.2g} of its largest action. "
            "Serve the policy as it is, and report this with the version of PyTorch."
        )
    return difference


def _inputs(policy: DeFIPolicy, batch: int, seed: int) -> ActInputs:
    random, observed, head = torch.Generator().manual_seed(seed), policy.config, policy.adapter.head.config
    size = (batch, observed.views, observed.gfdm.height, observed.gfdm.width, 3)
    seen: dict[str, Any] = {
        "images": torch.randint(256, size, dtype=torch.uint8, generator=random),
        "text": [_TEXT] * batch,
    }
    if head.proprio_dim:
        seen["proprio"] = torch.randn(batch, head.proprio_dim, generator=random)
    return gather(policy, seen, random)


def _tensors(inputs: ActInputs) -> dict[str, Tensor]:
    """Inputs as compiled code takes them: it reads memory without a look at what is there, its type and its strides."""
    if inputs.gidm_mask is None:  # a text without padding
        inputs = inputs._replace(
            gidm_mask=torch.ones(
                inputs.gidm_words.shape[:2], dtype=torch.bool, device=inputs.gidm_words.device
            )
        )
    if inputs.proprio is not None:
        inputs = inputs._replace(proprio=inputs.proprio.float())
    return {name: value.contiguous() for name, value in inputs.tensors().items()}


class _ActOn(nn.Module):
    def __init__(self, policy: DeFIPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, **tensors: Tensor) -> Tensor:
        parts: Mapping[str, Tensor | None] = {name: tensors.get(name) for name in ActInputs._fields}
        return self.policy.act_on(ActInputs(**parts))  # type: ignore[arg-type]


def _read(path: str | Path) -> dict[str, Any]:
    """Metadata of a package; none of its code runs. Raises: ModelFolderError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # PyTorch does not look
                raise zipfile.BadZipFile(damaged)
            name = next(name for name in archive.namelist() if name.endswith("_metadata.json"))
            made_for: dict[str, Any] = json.loads(json.loads(archive.read(name))[_KEY])
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read ({error.strerror or error}). {_MAKE}") from error
    except (zipfile.BadZipFile, StopIteration, KeyError, ValueError) as error:
        raise ModelFolderError(f"{path} is no package of acting, or not all of one. {_MAKE}") from error
    return made_for


def _made_for(policy: DeFIPolicy, batch: int) -> dict[str, Any]:
    """All that a package is bound to, as JSON values."""
    config = json.dumps(to_mapping(policy.config), sort_keys=True)
    digest = hashlib.sha256()
    for name, value in [*policy.named_parameters(), *policy.named_buffers()]:
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return {
        "batch": batch,
        "device": policy.device.type,
        "processor": _processor(policy.device),
        "precision": str(policy.dtype),
        "steps": policy.acting.steps,
        "sigma_min": policy.acting.sigma_min,
        "tiled_text_mask": policy.adapter.latent_actions.config.tiled_text_mask,
        "config": hashlib.sha256(config.encode()).hexdigest()[:16],
        "weights": digest.hexdigest()[:16],
    }


def _processor(device: torch.device) -> str:
    """The instructions that code is compiled for."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability()
