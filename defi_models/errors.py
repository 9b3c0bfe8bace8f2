"""What a user of the models can cause, with the thing, the place and the fix in the message."""

from __future__ import annotations


class ModelFolderError(ValueError):
    """A model folder or weight file that is absent, partial, damaged or of another model."""


class ConfigurationError(ValueError):
    """A preset, field or value that does not exist or does not fit the others."""
