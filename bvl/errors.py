"""Errors a user can act on. The command line prints them without a traceback."""


class UserError(Exception):
    """Something the user can mend; the message says what, where and what to do."""


class ConfigError(UserError):
    """A config key, value or combination that cannot be used."""


class DataError(UserError):
    """A folder, manifest or set of records that cannot be used."""


class ImageError(DataError):
    """One image that cannot be read."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


class RunFolderError(UserError):
    """A run folder that is in use, belongs to another config, or is incomplete."""


class ConversionError(UserError):
    """Weights, or a config of another library, that bvl cannot take over or hand on."""
