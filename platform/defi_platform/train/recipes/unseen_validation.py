"""Whether a policy is validated on episodes that its pretraining never saw, as far as the run folders tell.

Pretrainings that named the same `data.split` trained on no episode that it holds out; those that started from another model
did so if that one did. A model folder that lies in no run folder, such as a converted checkpoint, says nothing of its data.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from defi_platform import storage
from defi_platform.config import FinetuneConfig
from defi_platform.config.data import drawn_corpora
from defi_platform.data.manifest.project_split import ProjectSplit

RUN_CONFIG = "config.yaml"


def unseen_by(config: FinetuneConfig) -> dict[str, bool]:
    """Model (gfdm | gidm | init_from) -> True where its training kept to the split of this fine-tuning; False: not known.

    All are False where the project has trained on some of what is held out here.

    Args:
        config: with absolute paths.
    """
    split = config.data.split
    models = {"gfdm": config.gfdm, "gidm": config.gidm}
    if config.model.init_from is not None:
        models["init_from"] = config.model.init_from
    if split is None or _trained_too(config):
        return dict.fromkeys(models, False)
    known = ProjectSplit(split).corpora()
    return {name: _kept_to(split, known, folder) for name, folder in models.items()}


def unseen_line(config: FinetuneConfig) -> str:
    """One line about `unseen_by`, with the way to change it. Args: config: with absolute paths."""
    if count := _trained_too(config):
        return (
            f"validation: {count} of the episodes that data.split holds out here are training episodes of another corpus "
            "of the project, or were; for a validation on unseen ones, give all trainings the same corpora under the same "
            "names and a new data.split=FOLDER, and train again"
        )
    unknown = [name for name, known in unseen_by(config).items() if not known]
    if not unknown:
        return "validation: episodes that no pretraining saw (data.split)"
    return (
        f"validation: it is not known whether the pretraining of {' and '.join(unknown)} saw these episodes; give all "
        "trainings of a project one data.split=FOLDER, also those of the models that they start from"
    )


def _trained_too(config: FinetuneConfig) -> int:
    split = config.data.split
    return 0 if split is None else ProjectSplit(split).trained_too(drawn_corpora(config.data))


def _kept_to(split: str, known: set[str], model: str) -> bool:
    """Whether the run that a model folder is of, and all that it started from, kept to a split.

    Args:
        split: folder of the split.
        known: corpora in it. Where those of the run are not, it was begun anew since.
        model: the folder.
    """
    path = storage.join(model.rstrip("/").rpartition("/")[0], RUN_CONFIG)
    if not storage.exists(path):
        return False
    run = OmegaConf.create(storage.read_text(path))
    if OmegaConf.select(run, "data.split") != split:
        return False
    corpora: dict[str, Any] = OmegaConf.select(run, "data.corpora") or {}
    if any(corpus.get("weight", 1) and name not in known for name, corpus in corpora.items()):
        return False
    began = [OmegaConf.select(run, key) for key in ("model.init_from", "gfdm", "gidm")]
    return all(_kept_to(split, known, one) for one in began if one)
