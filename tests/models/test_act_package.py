"""Files of acting compiled ahead; tests/train/test_recipes.py makes a real one, and serves it."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import generators, observation
from torch import Tensor

from defi_models.act import package
from defi_models.act.inputs import ActInputs, gather
from defi_models.act.package import ActPackage, write_package
from defi_models.errors import InputError, ModelFolderError
from defi_models.policy import DeFIPolicy


class Compiler:
    """PyTorch's compiler and loader, which keep the policy as it is; its actions are off by `error`, as a share of
    the largest."""

    def __init__(self, policy: DeFIPolicy) -> None:
        self.policy, self.error, self.options = policy, torch.zeros(()), dict[str, Any]()

    def export(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Tensor]) -> torch.nn.Module:
        return module

    def compiled(self, program: Any, package_path: str, inductor_configs: dict[str, Any]) -> str:
        self.options = inductor_configs
        (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "weights.so").touch()
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("act/x_metadata.json", json.dumps(inductor_configs["aot_inductor.metadata"]))
        return package_path

    def load(self, path: str) -> Compiler:
        assert Path(path).exists()
        return self

    def __call__(self, **tensors: Tensor) -> Tensor:
        assert all(value.is_contiguous() for value in tensors.values()), "compiled code does not look"
        assert tensors["proprio"].dtype == torch.float32 and "gidm_mask" in tensors
        parts = {name: tensors.get(name) for name in ActInputs._fields}
        chunk = self.policy.act_on(ActInputs(**parts))  # type: ignore[arg-type]
        return chunk + self.error * chunk.abs().max()


@pytest.fixture
def compiler(policy: DeFIPolicy, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler(policy)
    monkeypatch.setattr(package.torch.export, "export", found.export)
    monkeypatch.setattr(package.torch._inductor, "aoti_compile_and_package", found.compiled)
    monkeypatch.setattr(package.torch._inductor, "aoti_load_package", found.load)
    return found


def test_inputs_reach_the_compiled_code_in_the_layout_that_it_was_made_for(
    policy: DeFIPolicy, compiler: Compiler, tmp_path: Path
) -> None:
    assert write_package(policy, tmp_path / "act.pt2") < 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["act.pt2"], "the compiler's own files are gone"
    assert compiler.options["cpp.dynamic_threads"], "a server may have more threads"
    expected, seen = policy.act(observation(1), generators(1)), observation(1)
    assert not seen["images"].is_contiguous()
    policy.replay(ActPackage(tmp_path / "act.pt2", policy))
    assert torch.allclose(policy.act(seen, generators(1)), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"images: got a batch of 2; this package was made for one of 1"):
        policy.act(observation(2), generators(2))
    doubles = seen | {"proprio": seen["proprio"].double()}
    assert torch.allclose(policy.act(doubles, generators(1)), expected, atol=1e-6)
    whole = gather(policy, seen, generators(1))._replace(gidm_mask=None)
    assert torch.allclose(ActPackage(tmp_path / "act.pt2", policy)(whole), policy.act_on(whole), atol=1e-6)
    policy.set_acting(replace(policy.acting, steps=2))
    with pytest.raises(InputError, match=r"acting or statistics: the policy's have changed.*replay\(None\)"):
        policy.act(seen, generators(1))


def test_compiled_code_that_computes_something_else_leaves_no_file(
    policy: DeFIPolicy, compiler: Compiler, tmp_path: Path
) -> None:
    for error in (0.01, float("nan")):
        compiler.error = torch.tensor(error)
        with pytest.raises(ModelFolderError, match=r"acts otherwise than the policy: by (0\.01|nan) of its"):
            write_package(policy, tmp_path / "act.pt2")
        assert not list(tmp_path.iterdir())


def test_each_dimension_of_an_action_counts_whatever_its_unit(
    policy: DeFIPolicy, compiler: Compiler, tmp_path: Path
) -> None:
    policy.action_normalizer.scale.copy_(torch.tensor([1000.0, 1.0, 1.0, 0.1]))
    compiler.error = torch.tensor([0.0, 0.0, 0.0, 1e-4])
    with pytest.raises(ModelFolderError, match="acts otherwise than the policy"):
        write_package(policy, tmp_path / "act.pt2")


def test_a_package_of_another_policy_or_use_is_refused(
    policy: DeFIPolicy, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(policy, tmp_path / "act.pt2")
    config, frames = policy.config, replace(policy.config.adapter, frame_pair=(0, 3))
    policy.config = replace(config, adapter=frames)
    with pytest.raises(ModelFolderError, match=r"made of another policy.*\(config: \w+ there, \w+ here\)"):
        ActPackage(tmp_path / "act.pt2", policy)
    policy.config = config
    with monkeypatch.context() as there:
        there.setattr(package.torch.backends.cpu, "get_cpu_capability", lambda: "NEON")
        with pytest.raises(ModelFolderError, match=r"\(processor: \w+ there, NEON here\)"):
            ActPackage(tmp_path / "act.pt2", policy)
    with torch.no_grad():
        next(policy.adapter.head.parameters()).add_(1.0)
    with pytest.raises(ModelFolderError, match=r"made of another policy.*weights: \w+ there, \w+ here"):
        ActPackage(tmp_path / "act.pt2", policy)


def test_another_file_is_no_package(policy: DeFIPolicy, tmp_path: Path) -> None:
    path = tmp_path / "act.pt2"
    with pytest.raises(ModelFolderError, match=r"cannot be read \(No such file.*package\.path=FILE\.pt2"):
        ActPackage(path, policy)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ModelFolderError, match=r"no package of acting, or not all of one.*package\.path="):
        ActPackage(path, policy)
    made = json.dumps({"defi_act": json.dumps({"batch": 1})})
    for metadata, error in (("{}", "no package of acting"), (made, "made of another policy")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("act/x_metadata.json", metadata)
            archive.writestr("act/x.so", "weights")
        with pytest.raises(ModelFolderError, match=error):
            ActPackage(path, policy)
    path.write_bytes(path.read_bytes().replace(b"weights", b"weighty"))
    with pytest.raises(ModelFolderError, match="no package of acting, or not all of one"):
        ActPackage(path, policy)
