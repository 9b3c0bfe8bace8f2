from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from defi_models import describe, presets
from defi_models.cost import roofline
from defi_models.cost.operations import Operations
from defi_models.gidm import GIDM

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
from readme import the_one


@pytest.fixture(scope="module")
def nano() -> dict[str, describe.Cost]:
    return {cost.kind: cost for cost in describe.describe("nano")}


def test_parameters_are_those_of_the_built_model(nano: dict[str, describe.Cost]) -> None:
    built = GIDM(presets.gidm("nano"))
    assert nano["gidm"].parameters == sum(p.numel() for p in built.parameters())


def test_activations_are_those_that_a_real_step_keeps(nano: dict[str, describe.Cost]) -> None:
    model = GIDM(presets.gidm("nano")).to(torch.bfloat16).eval()
    features, text = torch.randn(1, 2, 64, 36), torch.randn(1, 20, 32)
    mask = torch.ones(1, 20, dtype=torch.bool)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(features, text, mask)
    assert nano["gidm"].activation_bytes == pytest.approx(sum(kept.values()), rel=0.25)


def test_zero_stages_share_what_they_say(nano: dict[str, describe.Cost]) -> None:
    cost = nano["policy"]
    all_of_it = 2 * cost.parameters + 14 * cost.trained
    assert [cost.state_bytes(stage, 1) for stage in range(4)] == [all_of_it] * 4
    assert cost.state_bytes(0, 8) == all_of_it
    assert cost.state_bytes(1, 8) == pytest.approx(2 * cost.parameters + (2 + 12 / 8) * cost.trained, abs=8)
    assert cost.state_bytes(2, 8) == pytest.approx(2 * cost.parameters + 14 / 8 * cost.trained, abs=8)
    assert cost.state_bytes(3, 8) == pytest.approx(all_of_it / 8, abs=8)


def test_a_chunk_costs_gfdm_once_and_the_head_for_every_step(nano: dict[str, describe.Cost]) -> None:
    chunk = nano["policy"].chunk_flops
    assert set(chunk) == {"codec", "gfdm, one step", "gidm + video-former", "action head"}
    assert all(flops > 0 for flops in chunk.values())


def test_recomputing_keeps_fewer_activations(nano: dict[str, describe.Cost]) -> None:
    less = {cost.kind: cost for cost in describe.describe("nano", recompute=True)}
    assert all(less[kind].activation_bytes < 0.7 * nano[kind].activation_bytes for kind in nano)


def test_the_readme_s_command_describes_the_paper_without_allocating_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    python, option, module, *arguments = shlex.split(
        the_one("The models by themselves", "python -m defi_models.describe")
    )
    assert (python, option) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module)  # as `python -m` finds it
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "1,524,623,082" in printed and "ZeRO 3" in printed and "GFLOP per action chunk" in printed
    assert "gfdm" in printed.lower()


def test_an_unknown_preset_names_the_nearest(capsys) -> None:
    assert describe.main(["papr"]) == 2
    assert "Did you mean 'paper'" in capsys.readouterr().err


def test_the_least_time_is_that_of_each_kernel_s_tightest_limit() -> None:
    a, b = torch.zeros(4096, 4096, device="meta"), torch.zeros(64, device="meta")
    with Operations() as seen:
        a @ a  # as much arithmetic as nothing else here
        a + a  # memory alone
        b + b  # neither
    on = roofline.Device("test", flops=1e12, bandwidth=1e10)
    found = roofline.estimate(seen, on)
    product, moved = 2 * 4096**3 / 1e12, 3 * 4 * 4096**2 / 1e10
    assert found.graph == pytest.approx(product + moved + roofline.KERNEL_S)
    assert found.fused == pytest.approx(product) and found.eager == found.graph
    slow = roofline.estimate(seen, roofline.Device("no limit", flops=1e30, bandwidth=1e30))
    assert slow.eager == pytest.approx(3 * roofline.LAUNCH_S)


def test_a_chunk_of_the_published_size_costs_less_than_the_released_way_to_compute_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert describe.main(["paper", "--device", "h100"]) == 0
    row = next(
        line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("act()")
    )
    kernels, gflop, _, waits = (float(value.replace(",", "")) for value in row[1:5])
    # one text per frame and position, upsampled convolutions, a context read in every step: 6,525 and 3,653
    assert gflop < 5_910 and kernels < 3_000 and waits == 0


def test_an_unknown_device_is_named_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main(["nano", "--device", "h10"]) == 2
    assert "no device 'h10'" in capsys.readouterr().err
