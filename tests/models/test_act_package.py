"""Files of acting compiled ahead; tests/train/test_recipes.py makes a real one, and serves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import generators, observation
from torch import Tensor

from defi_models.act import package
from defi_models.act.inputs import ActInputs
from defi_models.act.package import ActPackage, write_package
from defi_models.errors import InputError, ModelFolderError
from defi_models.policy import DeFIPolicy


class Compiler:
    """PyTorch's compiler and loader, which keep the policy as it is; its actions are `error` off."""

    def __init__(self, policy: DeFIPolicy) -> None:
        self.policy, self.error, self.metadata = policy, 0.0, {"defi_act": "{}"}

    def export(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Tensor]) -> torch.nn.Module:
        return module

    def compiled(self, program: Any, package_path: str, inductor_configs: dict[str, Any]) -> str:
        self.metadata = inductor_configs["aot_inductor.metadata"]
        Path(package_path).touch()
        return package_path

    def load(self, path: str) -> Compiler:
        assert Path(path).exists()
        return self

    def get_metadata(self) -> dict[str, str]:
        return self.metadata

    def __call__(self, **tensors: Tensor) -> Tensor:
        assert all(value.is_contiguous() for value in tensors.values()), "compiled code does not look"
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
    expected, seen = policy.act(observation(1), generators(1)), observation(1)
    assert not seen["images"].is_contiguous()
    policy.replay(ActPackage(tmp_path / "act.pt2", policy))
    assert torch.allclose(policy.act(seen, generators(1)), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"images: got a batch of 2; this package was made for one of 1"):
        policy.act(observation(2), generators(2))
    policy.set_acting(replace(policy.acting, steps=2))
    with pytest.raises(InputError, match=r"acting or statistics: the policy's have changed.*replay\(None\)"):
        policy.act(seen, generators(1))


def test_compiled_code_that_computes_something_else_leaves_no_file(
    policy: DeFIPolicy, compiler: Compiler, tmp_path: Path
) -> None:
    for error in (0.01, float("nan")):
        compiler.error = error
        with pytest.raises(ModelFolderError, match=r"acts otherwise than the policy: by (0\.01|nan) of its"):
            write_package(policy, tmp_path / "act.pt2")
        assert not list(tmp_path.iterdir())


def test_a_package_of_another_policy_or_use_is_refused(
    policy: DeFIPolicy, compiler: Compiler, tmp_path: Path
) -> None:
    write_package(policy, tmp_path / "act.pt2")
    with torch.no_grad():
        next(policy.adapter.head.parameters()).add_(1.0)
    with pytest.raises(ModelFolderError, match=r"made of another policy.*weights: \w+ there, \w+ here"):
        ActPackage(tmp_path / "act.pt2", policy)


def test_another_file_is_no_package(policy: DeFIPolicy, tmp_path: Path) -> None:
    (tmp_path / "act.pt2").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelFolderError, match=r"no package of acting.*package\.path=FILE\.pt2"):
        ActPackage(tmp_path / "act.pt2", policy)
