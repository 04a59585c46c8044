"""The library's errors: each message says what was found, what was expected, and what to change."""


class PolarGradError(Exception):
    """Base of every error this project raises for a user's mistake or a damaged input."""


class ConfigError(PolarGradError):
    """A configuration key, or a combination of keys, that cannot be run."""


class DataError(PolarGradError):
    """A corpus, tokenizer or token shard that cannot be used as it is."""


class CheckpointError(PolarGradError):
    """A checkpoint that is missing, damaged, or of another model, tokenizer or data."""


class PolarError(PolarGradError):
    """A matrix whose polar decomposition is not defined (NaN or Inf entries) or did not converge."""


class TrainingError(PolarGradError):
    """A run that cannot go on: too many skipped steps, weights that are not finite, a rank that does not answer."""
