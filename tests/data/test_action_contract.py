"""What a policy says about its actions: of its corpora, of the configuration, or plainly unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from defi_models import presets
from defi_models.errors import ModelFolderError
from defi_models.inputs.action_contract import ActionContract
from defi_models.policy import DeFIPolicy
from defi_platform.config import ActionConfig
from defi_platform.data.loader.action_contract import CALVIN, common, configured, contract_of
from defi_platform.errors import ConfigError
from defi_platform.serve.policy_folder import action_terms


def test_the_configuration_wins_over_the_corpus_and_what_nobody_says_is_unknown() -> None:
    calvin = contract_of("calvin", "/nowhere", 30.0)
    assert configured(calvin, ActionConfig(kind="absolute", execute_steps=4), 7, 10) == ActionContract(
        names=CALVIN.names, units=CALVIN.units, kind="absolute", gripper=CALVIN.gripper, control_hz=30.0, execute_steps=4
    )  # fmt: skip
    plain = configured(ActionContract(), ActionConfig(), 3, 10)
    assert (plain.names, plain.kind, plain.control_hz, plain.execute_steps) == ((), "unknown", None, 10)
    assert configured(calvin, ActionConfig(), 5, 10).names == (), (
        "names for seven entries are not those of five"
    )


def test_what_corpora_say_differently_is_unknown() -> None:
    slow = contract_of("calvin", "/nowhere", 15.0)
    both = common([slow, contract_of("calvin", "/nowhere", 30.0)])
    assert (both.names, both.kind, both.control_hz) == (CALVIN.names, "relative", None)
    assert common([slow, ActionContract(control_hz=15.0)]) == ActionContract(control_hz=15.0)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (ActionConfig(names=["x", "y"]), r"actions\.names has 2 entries \(x, y\), an action of the corpus has 7"),
        (ActionConfig(units=["m"]), r"actions\.units has 1 entries"),
        (ActionConfig(kind="relativ"), r"actions\.kind is 'relativ'; choose absolute"),
        (ActionConfig(control_hz=float("nan")), r"actions\.control_hz is nan"),
        (ActionConfig(execute_steps=0), r"actions\.execute_steps is 0; a chunk has 1 to 10"),
    ],
)  # fmt: skip
def test_a_contract_that_cannot_be_is_refused(config: ActionConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        configured(CALVIN, config, 7, 10)


def test_a_policy_folder_keeps_it_and_one_from_before_says_unknown(tmp_path: Path) -> None:
    policy = DeFIPolicy(presets.policy("nano", views=2, cameras=["wrist", "front"]))
    policy.contract = ActionContract(names=("a", "b", "c", "d"), kind="absolute", execute_steps=5)
    policy.save_pretrained(tmp_path / "p")
    kept = DeFIPolicy.from_pretrained(tmp_path / "p")
    assert kept.contract == policy.contract and kept.config.cameras == ("wrist", "front")
    assert action_terms(kept)["execute_steps"] == 5
    file = tmp_path / "p" / "actions.json"
    file.unlink()
    before = action_terms(DeFIPolicy.from_pretrained(tmp_path / "p"))
    assert (
        before["names"] == before["control_hz"] == before["min"] == "unknown"
        and before["execute_steps"] == 10
    )
    file.write_text(json.dumps({"names": 3}))
    with pytest.raises(ModelFolderError, match="does not hold the meaning of actions"):
        DeFIPolicy.from_pretrained(tmp_path / "p")
