"""Whether a run may go on: what its folder holds, compared with what is asked for now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from defi_models.errors import ConfigurationError
from defi_models.pretrained.configuration import from_mapping, to_mapping
from defi_platform import storage
from defi_platform.config import fields
from defi_platform.config.fields import Change, changes, unknown_keys
from defi_platform.config.loader import to_mapping as config_mapping
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.driver.older_runs import flat, model_as_begun, with_meaning
from defi_platform.train.recipe import Recipe
from defi_platform.train.segments import SETTINGS, Segment, continued, restarted, settings_of

CONFIG = "config.yaml"
BEGUN = "config_begun.yaml"
"""Configuration that a run was begun with, of a version whose checkpoints do not hold their settings; CONFIG is that of the
last attempt, which may have ended before its first checkpoint."""
SET_ASIDE = "set_aside"
"""Folder below a run's for what came after the checkpoint that it was taken up again from; each entry is a run folder."""
_SHOWN = 60
_AFTERWARDS = {
    "train.export_weights": "weights={now}",
    "acting.": "{key}={now}",
}
"""Keys that jobs/export_model.py has too, and how it is asked."""


@dataclass(frozen=True)
class Begun:
    """A run that a folder holds, up to the checkpoint that it goes on from."""

    folder: str
    step: int
    model: Mapping[str, Any]
    """`Recipe.identity` of it."""
    values: Mapping[str, Any]
    """Its configuration."""
    segments: list[Segment]
    older: bool
    """Of a version whose checkpoints do not hold their segments."""
    later: list[checkpoints.Checkpoint | checkpoints.Unusable]
    """To be set aside, newest last."""


def begun(recipe: Recipe, summary: Mapping[str, Any] | None = None) -> Begun | None:
    """The run in the recipe's folder; None where nothing has been reached yet.

    Args:
        recipe: of the run.
        summary: content of summary.json, where the run is complete.

    Raises: CheckpointError for a folder whose config.yaml is gone, ConfigError for a step of `train.restart_from` that has
        no checkpoint.
    """
    train = recipe.config.train
    there = checkpoints.listing(train.output)
    found, broken = there.committed, there.unusable
    if not found and summary is None and broken:
        raise CheckpointError(
            checkpoints.none_usable(train.output, 0, broken, [one.reason for one in broken if one.reason])
        )
    if not found and summary is None:
        if train.restart_from is not None:
            raise ConfigError(
                f"train.restart_from={train.restart_from}, but {train.output} holds no checkpoint. Leave it out."
            )
        return None
    values = _configuration(train.output)
    if not found:
        assert summary is not None
        segments = _segments([], recipe, values)
        return Begun(train.output, summary["steps"], summary["model"], values, segments, False, [])
    position, later = found[0].position, []
    if train.restart_from is not None and not restarted(_segments(position.segments, recipe, values), train):
        steps = {one.step: one for one in reversed(found)}
        if train.restart_from not in steps:
            raise ConfigError(
                f"train.restart_from={train.restart_from}, but {train.output} has no checkpoint of that step; it has: "
                f"{', '.join(map(str, sorted(steps)))}."
            )
        position = steps[train.restart_from].position
        # The newest that counts goes last: while it is there, what was interrupted is done again.
        ahead: list[checkpoints.Checkpoint | checkpoints.Unusable] = [
            *broken,
            *reversed(found),
        ]
        later = [one for one in ahead if one.step > position.step]
    segments = _segments(position.segments, recipe, values)
    return Begun(train.output, position.step, position.model, values, segments, not position.segments, later)


def _configuration(folder: str, name: str = CONFIG) -> dict[str, Any]:
    path = storage.join(folder, name)
    if not storage.exists(path):
        raise CheckpointError(
            f"{folder} holds a run and no {name}, so nobody can say whether it had these settings. Put the file back, "
            "or choose another train.output."
        )
    try:
        values = OmegaConf.to_container(OmegaConf.create(storage.read_text(path)))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("train"), dict):
        raise CheckpointError(
            f"{path} is damaged, so nobody can say whether the run had these settings. Put the file back, or choose "
            "another train.output."
        )
    return with_meaning(cast(dict[str, Any], values))


def keep_begun(before: Begun) -> None:
    """Keeps the configuration that an older run was begun with, before that of another attempt takes its place."""
    kept = storage.join(before.folder, BEGUN)
    if before.older and not storage.exists(kept):
        storage.write_text(kept, storage.read_text(storage.join(before.folder, CONFIG)))


def check_same_run(recipe: Recipe, before: Begun, complete: bool = False) -> None:
    """Compares a run with what its folder holds: model, folders that it is built from, settings.

    Args:
        recipe: of the run.
        before: what its folder holds.
        complete: the run is complete, so that what would change its results alone may no longer change either.

    Raises: CheckpointError for another model or other contents of a folder; ConfigError for other settings.
    """
    # A complete run does not need what it was built from any more: there the names have to do.
    by_name = complete and _gone(recipe, before)
    if not by_name:
        _check_model(recipe, before)
    if unknown := list(unknown_keys(recipe.config, before.values)):
        print(
            f"{recipe.kind}: {before.folder} was begun by a version with settings that this one does not have and leaves "
            f"out: {', '.join(unknown)}",
            flush=True,
        )
    train = recipe.config.train
    restarting = train.restart_from is not None and not restarted(before.segments, train)
    for change in _changes(recipe, before):
        if change.rule == fields.EXTEND or (change.rule == fields.CONTENT and not by_name):
            continue  # compared by `continued`, and by what is there
        if change.rule == fields.UNTIL_COMPLETE and not complete:
            continue
        if change.rule == fields.RESTART and restarting:
            continue
        raise ConfigError(_refusal(change, before))


def segments_now(recipe: Recipe, before: Begun) -> list[Segment]:
    """Segments of a run that goes on. Raises: ConfigError, see `continued`."""
    return continued(before.segments, recipe.config.train, before.step)


def set_aside(before: Begun, whole: tuple[str, ...]) -> str | None:
    """Moves the checkpoints after the one that a run is taken up again from into a run folder of their own.

    Done again after it was interrupted, it completes the same folder.

    Args:
        before: the run.
        whole: names of the run's files that go with them; results that the run will make again.

    Returns: that folder; None where there is nothing to set aside.
    """
    if not before.later:
        return None
    newest = before.later[-1].uri.rsplit("/", 1)[-1]
    target = storage.join(before.folder, SET_ASIDE, newest)
    for name in (CONFIG, BEGUN, "metrics.jsonl"):
        source = storage.join(before.folder, name)
        if storage.exists(source) and not storage.exists(storage.join(target, name)):
            storage.write_text(storage.join(target, name), storage.read_text(source))
    for name in whole:
        source = storage.join(before.folder, name)
        if storage.exists(source) or storage.is_folder(source):
            storage.move(source, storage.join(target, name))
    for checkpoint in before.later:
        name = checkpoint.uri.rsplit("/", 1)[-1]
        storage.move(checkpoint.uri, storage.join(target, checkpoints.FOLDER, name))
    return target


def _segments(found: Sequence[Mapping[str, Any]], recipe: Recipe, values: Mapping[str, Any]) -> list[Segment]:
    """Segments of a checkpoint; those of older runs have their configuration's settings from the beginning."""
    stored = [Segment.stored(one) for one in found]
    if stored:
        return stored
    first, train = Segment.first(recipe.config.train), values["train"]
    if storage.exists(storage.join(recipe.config.train.output, BEGUN)):
        train = _configuration(recipe.config.train.output, BEGUN)["train"]
    usual = {name: value for name, value in first.settings.items() if name not in train}
    settings = {name: train[name] for name in SETTINGS if name in train}
    return [replace(first, steps=train.get("steps", first.steps), settings={**usual, **settings})]


def _changes(recipe: Recipe, before: Begun) -> Iterator[Change]:
    """Settings that differ, those of segments by the checkpoint's own."""
    now = config_mapping(recipe.config)
    for change in changes(recipe.config, now, before.values):
        if change.rule != fields.RESTART:
            yield change
    settings = settings_of(recipe.config.train)
    for name, old in before.segments[-1].settings.items():
        if settings[name] != old:
            yield Change(f"train.{name}", old, settings[name], fields.RESTART)


def _refusal(change: Change, before: Begun) -> str:
    key, old, now = change.key, _short(change.before), _short(change.now)
    fixes = [f"Set it back ({key}={old})"]
    if change.rule == fields.RESTART:
        fixes.append(
            f"or go on with it from a checkpoint (the newest: train.restart_from={before.step}), what came after being "
            "set aside"
        )
    for start, ask in _AFTERWARDS.items():
        if key.startswith(start):
            asked = ask.format(key=key, now=now)
            fixes.append(f"or export what there is with it: jobs/export_model.py run={before.folder} {asked}")
    fixes.append("or choose another train.output")
    return (
        f"{before.folder} was trained to step {before.step} with {key}={old}, now it is {now}: the run could not go on "
        f"exactly. {', '.join(fixes)}."
    )


def _check_model(recipe: Recipe, before: Begun) -> None:
    present, wanted = before.model, recipe.identity()
    plain = [key for key in wanted if key not in ("config", "built_from")]
    if "config" in wanted:
        # What preset and overrides mean is compared, not how they are written.
        plain = [key for key in plain if key not in ("preset", "overrides")]
    differing = [
        f"{key} {present.get(key)!r} there, {wanted[key]!r} in the config"
        for key in plain
        if present.get(key) != wanted[key]
    ]
    if differing:
        raise CheckpointError(
            f"{before.folder} holds another model: {', '.join(differing)}. Choose another train.output, or the settings "
            "that it was written with."
        )
    if "config" in wanted:
        _check_configuration(recipe, before, wanted["config"])
    _check_contents(recipe, before, wanted["built_from"])


def _gone(recipe: Recipe, before: Begun) -> bool:
    """Whether a folder that the run was built from, and is named as then, is no more."""
    earlier = flat(before.values)
    return any(
        is_folder_key and value is not None and earlier.get(key) == value and not storage.is_folder(value)
        for key, value, is_folder_key in _contents(recipe.config)
    )


def _contents(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _contents(value, f"{key}.")
        elif fields.resume_rule(field) == fields.CONTENT:
            yield key, value, fields.is_path(field)


def _check_configuration(recipe: Recipe, before: Begun, wanted: Mapping[str, Any]) -> None:
    """Compares the whole configuration of the model, defaults included."""
    now = flat(wanted)
    there = _configuration_there(recipe, before)
    wrong = sorted(key for key in now.keys() | there.keys() if now.get(key) != there.get(key))
    if not wrong:
        return
    said = ", ".join(f"{key} {there.get(key)!r} there, {now.get(key)!r} in the config" for key in wrong)
    keys = " ".join(f"model.overrides.{key}={_yaml(there.get(key))}" for key in wrong if key in there)
    way = f" To go on as it was begun: {keys}." if keys and not recipe.config.model.init_from else ""
    raise CheckpointError(
        f"{before.folder} holds another model: {said}.{way} Or choose another train.output."
    )


def _configuration_there(recipe: Recipe, before: Begun) -> dict[str, Any]:
    schema = type(recipe.model_config())
    stored = before.model
    if "config" in stored:
        try:
            # A field that was not there yet had its default.
            return flat(to_mapping(from_mapping(schema, stored["config"])))
        except ConfigurationError as error:
            raise CheckpointError(
                f"{before.folder} was begun by another version of the model: {error} Choose another train.output, or go "
                "on with that version."
            ) from error
    preset, overrides = stored.get("preset", ""), stored.get("overrides") or {}
    model = replace(recipe.config.model, preset=preset, overrides=overrides)
    config = flat(to_mapping(recipe.model_config(model)))
    return config if model.init_from else model_as_begun(recipe.kind, preset, overrides, config)


def _check_contents(recipe: Recipe, before: Begun, wanted: Mapping[str, str]) -> None:
    """Compares the contents of the folders that a run is built from; of older runs, their places."""
    there = before.model.get("built_from")
    now = flat(config_mapping(recipe.config))
    earlier = flat(before.values)
    if there is None:
        for key in wanted:
            if earlier.get(key) != now.get(key):
                raise CheckpointError(
                    f"{before.folder} was built from {key}={earlier.get(key)}, now it is {now.get(key)}, and nobody can "
                    f"say whether that holds the same: its version kept no digests. Set it back, or choose another "
                    "train.output."
                )
        return
    for key in sorted(wanted.keys() | there.keys()):
        if wanted.get(key) != there.get(key):
            raise CheckpointError(
                f"{before.folder} was built from another {key}: {earlier.get(key)} (digest {_digest(there.get(key))}) "
                f"then, {now.get(key)} (digest {_digest(wanted.get(key))}) now. Put back what was there, or choose another "
                "train.output."
            )


def _digest(value: str | None) -> str:
    return "none" if value is None else value[:12]


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
