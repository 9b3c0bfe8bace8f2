"""Base class of the recipes: samples come from a plan over the configured video corpora."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.pretrained.configuration import from_mapping
from defi_models.pretrained.digest import folder_digest
from defi_models.pretrained.folder import CONFIG_FILE, read_header
from defi_platform import storage
from defi_platform.config import ModelConfig, PretrainConfig, TrainConfig
from defi_platform.config.data import drawn_corpora
from defi_platform.data.latents.cache import stored_dtype
from defi_platform.data.loader.stream import local_batches, stream
from defi_platform.data.manifest.commit_marker import read_committed
from defi_platform.data.manifest.quarantine import skipped
from defi_platform.data.manifest.split import TRAIN, VALIDATION
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import Rule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.data.sources.formats import format_of
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.storage import StorageError
from defi_platform.train.engine.collectives import Communicator
from defi_platform.train.recipe import Recipe
from defi_platform.train.recipes.latent_cache_use import CacheUse
from defi_platform.train.recipes.pinned_data import PinnedData
from defi_platform.train.recipes.text_store_use import TextEncoder, TextStoreUse, read_only

DATA_STATS = "data_stats.txt"

Model = TypeVar("Model", bound=nn.Module)


class VideoRecipe(Recipe):
    """A recipe that learns from video corpora."""

    config_type: type[PretrainConfig] = PretrainConfig
    """Config class of the recipe."""

    def __init__(self, config: PretrainConfig):
        super().__init__(config)
        self._cache: CacheUse | None = None
        self._texts: TextStoreUse | None = None
        self._pinned = PinnedData(self.kind)

    def built_from(self) -> dict[str, str]:
        """Digest of the model folder that training starts from, and the type that a latent cache rounds to.

        Raises: CheckpointError for a folder that is absent or partial, StorageError.
        """
        found = (
            {} if self.config.model.init_from is None else {"model.init_from": self.config.model.init_from}
        )
        digests = {key: digest_of(folder) for key, folder in found.items()}
        cache = self.config.data.cache
        # Of a cache in float32 training gets what it gets of pictures: it may come and go.
        if cache is not None and (dtype := stored_dtype(cache)) != "float32":
            digests["data.cache"] = dtype
        return digests

    def load(self, from_pretrained: Callable[..., Model], key: str, folder: str) -> Model:
        """The model of a folder that the run is built from, with the contents that it was begun with.

        Args:
            from_pretrained: of the model.
            key: of the config, as in `built_from`.
            folder: its value.

        Raises: CheckpointError when the folder is absent, damaged, of another model or has changed since.
        """
        return load_folder(from_pretrained, folder, self.begun_with.get(key))

    @abstractmethod
    def rule(self) -> Rule:
        """The rule by which a sample is cut out of a video."""

    def build(self) -> nn.Module:
        """Builds the model; a configured latent cache is checked against its encoder."""
        model = self.build_without_cache()
        # The export builds once more, when the counts of the run's cache are still wanted.
        if self.config.data.cache is not None and self._cache is None:
            self._cache = CacheUse(model, self.config.data, self.plan(TRAIN))
        return model

    def encode_texts(self, model: nn.Module, communicator: Communicator) -> None:
        """Brings `data.text_cache` up to date with the texts of the run's videos, and reads from it (collective)."""
        folder, encoders = self.config.data.text_cache, self.text_encoders(model)
        if folder is None:
            _check_text_encoders(self.config.train, encoders, communicator.world_size)
            return
        _, texts = communicator.together(lambda: self.plan(TRAIN).manifest.codes("text"))
        self._texts = TextStoreUse(folder, self.config.train)
        line = self._texts.fill(encoders, texts, communicator, communicator.together(self.evaluated_texts))
        if communicator.is_rank_zero:
            print(f"{self.kind}: {line}", flush=True)

    def read_texts(self, model: nn.Module) -> None:
        """Has the text encoders of a model that is evaluated read `data.text_cache`, where there is one."""
        if self.config.data.text_cache is not None:
            read_only(self.config.data.text_cache, self.text_encoders(model))

    def evaluated_texts(self) -> list[str]:
        """The different texts of the samples that `evaluate` takes, as far as no video of theirs is bad."""
        number = self.evaluated_samples
        return texts_of(self.plan(VALIDATION), range(number)) if number else []

    def text_encoders(self, model: Any) -> list[TextEncoder]:
        """Frozen text encoders of the model, each with the features of a text that training reads: states | goal."""
        return [(model.text_encoder, ("states",))]

    @abstractmethod
    def build_without_cache(self) -> nn.Module:
        """The model alone; see `Recipe.build`."""

    def prepare(self) -> None:
        """Brings the manifest up to date, fixes its version for the run and checks that both splits have samples."""
        self._pinned.ingest(self.config.train.output, "data", self.config.data)
        for split in ("train", "validation"):
            for line in _left_out(self.plan(split)):
                print(f"{self.kind}: {line}", flush=True)

    def data_version(self) -> dict[str, dict[str, str]]:
        """Part of the configuration -> corpus -> table of its manifest that this run reads."""
        return self._pinned.tables

    def describe_data(self) -> list[str]:
        """Corpora with their formats, videos and shares of the mixture, and samples per epoch where known."""
        data, lines, known = self.config.data, [], True
        if not data.corpora:
            raise ConfigError(
                "data.corpora is empty. Name at least one corpus: data.corpora.NAME.path=FOLDER"
            )
        total = sum(corpus.weight for corpus in data.corpora.values())
        for name, corpus in drawn_corpora(data).items():
            share = corpus.weight / total if total else 0.0
            found = read_committed(data.manifest, name)
            known &= found is not None
            videos = "not ingested yet" if found is None else f"{found.counts['videos']} videos"
            lines.append(
                f"{name}: {corpus.path}, {format_of(name, corpus)}, {videos}, {share:.1%} of the mixture"
            )
        for split in ("train", "validation") if known else ():
            plan = self.plan(split)
            lines.append(f"{split}: {sum(plan.samples_per_epoch.values()):,} samples per epoch")
            lines += _left_out(plan)
        if not known:
            lines.append("samples per epoch: known after the first ingest, which the run begins with")
        return lines

    def plan(self, split: str) -> Plan:
        """The plan of one split over the run's version of the manifest."""
        data = self.config.data
        manifest = self._pinned.open(self.config.train.output, "data", data)
        return Plan.of(manifest, data, self.rule(), self.config.train.seed, split)

    def fingerprint(self, plan: Plan) -> str:
        """A hash that changes when any sample of the plan may."""
        return plan.fingerprint()

    def stream(self, plan: Plan, shard: Shard) -> Iterable[dict[str, Any]]:
        """Micro-batches of one rank's share of a plan, from the latent cache where one is configured."""
        cache = self._cache
        batches = stream(
            plan,
            self.config.data,
            shard,
            cache=cache.location if cache else None,
            keep_stats=self._keep_stats if shard.rank == 0 else None,
            run=self.config.train.output,
        )
        return cache.count(batches, announce=shard.rank == 0) if cache else batches

    def validation_stream(self, plan: Plan, start: int, stop: int, size: int) -> Iterable[dict[str, Any]]:
        """Batches of pictures, loaded in this process.

        Args:
            plan: of the validation split.
            start: first sample number.
            stop: sample number after the last one.
            size: samples per batch.
        """
        # From pictures also where there is a cache: they are shown, and decoded only once.
        return local_batches(plan, self.config.data, Shard.single(start, stop, size))

    def _keep_stats(self, text: str) -> None:
        """Writes Ray Data's statistics of rank 0's stream; each attempt at a run overwrites them, none reads them."""
        path = storage.join(self.config.train.output, DATA_STATS)
        try:
            storage.write_text(path, text)
        except (OSError, StorageError) as error:
            print(f"{self.kind}: {path} cannot be written for now, training continues: {error}", flush=True)

    def summary(self, validation: dict[str, Any]) -> dict[str, Any]:
        """The use of the latent cache and of the stored texts, where they are configured."""
        used = {"cache": self._cache, "text_cache": self._texts}
        return {name: one.summary() for name, one in used.items() if one}

    def skipped(self) -> dict[str, int]:
        """Number of quarantined videos by reason."""
        return skipped(self.config.data.manifest)

    def check_size(self, what: str, wanted: Any, given: Any, field: str) -> None:
        """Checks that samples are cut as the model needs them.

        Args:
            what: name of the model's field.
            wanted: its value.
            given: value of the data's field.
            field: name of the data's field.

        Raises: ConfigError.
        """
        if wanted != given:
            raise ConfigError(
                f"data.{field}={given}, but the {self.kind} model '{self.config.model.preset}' has {what}={wanted}. "
                f"Set data.{field}={wanted}, or model.overrides."
            )


def _check_text_encoders(train: TrainConfig, encoders: list[TextEncoder], workers: int) -> None:
    """Refuses what would never end. Raises: ConfigError."""
    weights = any(True for encoder, _ in encoders for _ in encoder.parameters())
    if train.zero_stage == 3 and workers > 1 and weights:
        raise ConfigError(
            "train.zero_stage=3 spreads the text encoder over the workers, which would have to run it equally often, "
            "though each meets other texts. Set data.text_cache=FOLDER: texts are encoded before, and no step runs it."
        )


def texts_of(plan: Plan, samples: range) -> list[str]:
    """The different texts of samples of a plan, in their order."""
    return list(dict.fromkeys(sample.text for sample in plan.resolve_many(samples)))


def _left_out(plan: Plan) -> list[str]:
    return [f"{plan.split}: {count:,} left out, {why}" for why, count in plan.excluded.items()]


def starting_config(model: type[Any], preset: Callable[..., Any], settings: ModelConfig) -> Any:
    """The config of the model that training starts from: its folder's, else the preset's with the overrides.

    Args:
        model: class of the model.
        preset: function of `defi_models.presets` for that class.
        settings: names the folder or the preset.

    Raises: CheckpointError, ConfigError.
    """
    if settings.init_from:
        return folder_config(model, settings.init_from)
    with model_errors():
        return preset(settings.preset, **settings.overrides)


def folder_config(model: type[Any], folder: str) -> Any:
    """The config of a model folder, without its weights. Raises: CheckpointError, StorageError."""
    storage.ensure_complete(folder)
    path = storage.join(folder, CONFIG_FILE)
    if not storage.exists(path):
        raise CheckpointError(
            f"model folder {folder} does not exist or has no {CONFIG_FILE}. Check the path, or train that model first."
        )
    with model_errors(), storage.local_copy(path) as local:
        header = read_header(local.parent)
        if header["model"] != model.kind:
            raise CheckpointError(f"{folder} holds a '{header['model']}' model; '{model.kind}' is expected.")
        return from_mapping(model.Config, header["config"], f"{path}: config")


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """Turns the models' own errors into the platform's."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigError(f"model: {error}") from error
    except ModelFolderError as error:
        raise CheckpointError(str(error)) from error


def digest_of(folder: str) -> str:
    """The digest of a local or remote model folder. Raises: CheckpointError, StorageError."""
    if not storage.is_folder(folder):
        raise CheckpointError(
            f"model folder {folder} does not exist. Check the path, or train that model first."
        )
    with model_errors(), storage.local_copy(folder) as local:
        return folder_digest(local)


def load_folder(from_pretrained: Callable[..., Model], folder: str, digest: str | None = None) -> Model:
    """A model from a local or remote model folder.

    Args:
        from_pretrained: of the model.
        folder: where it lies.
        digest: that its contents must have; None: any.

    Raises: CheckpointError when the folder is absent, damaged, of another model or of other contents.
    """
    if not storage.is_folder(folder):
        raise CheckpointError(
            f"model folder {folder} does not exist. Check the path, or train that model first."
        )
    with model_errors(), storage.local_copy(folder) as local:
        if digest is not None and (found := folder_digest(local)) != digest:
            raise CheckpointError(
                f"{folder} has changed since the run was begun with it (digest {digest[:12]} then, {found[:12]} now), so its "
                "frozen weights would be others. Put back what was there, or begin anew in another train.output."
            )
        return from_pretrained(local)
