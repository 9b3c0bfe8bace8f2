"""Whether a policy is validated on episodes that its pretraining never saw, as far as the run folders tell.

Pretrainings that named the same `data.split` trained on no episode that it holds out. A model folder that lies in no run
folder, such as a converted checkpoint, says nothing of its data.
"""

from __future__ import annotations

from omegaconf import OmegaConf

from defi_platform import storage
from defi_platform.config import FinetuneConfig

RUN_CONFIG = "config.yaml"


def unseen_by(config: FinetuneConfig) -> dict[str, bool]:
    """Model (gfdm | gidm) -> True where its pretraining kept to the split of this fine-tuning; False: not known.

    Args:
        config: with absolute paths.
    """
    return {
        name: config.data.split is not None and _split_of(folder) == config.data.split
        for name, folder in (("gfdm", config.gfdm), ("gidm", config.gidm))
    }


def unseen_line(unseen: dict[str, bool]) -> str:
    """One line about `unseen_by`, with the way to change it."""
    unknown = [name for name, known in unseen.items() if not known]
    if not unknown:
        return "validation: episodes that no pretraining saw (data.split)"
    return (
        f"validation: it is not known whether the pretraining of {' and '.join(unknown)} saw these episodes; give all "
        "trainings of a project one data.split=FOLDER"
    )


def _split_of(model: str) -> str | None:
    config = storage.join(model.rstrip("/").rpartition("/")[0], RUN_CONFIG)
    if not storage.exists(config):
        return None
    found = OmegaConf.select(OmegaConf.create(storage.read_text(config)), "data.split")
    return None if found is None else str(found)
