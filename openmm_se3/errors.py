"""The errors this package raises; each message names what was wrong, what was expected and what to do."""


class ModelFileError(ValueError):
    """A model file is missing, truncated, foreign, tampered with, or of another format."""


class UnsupportedSystemError(ValueError):
    """The atoms, the box or the coordinates are none that the model can describe."""


class SimulationError(RuntimeError):
    """The simulation cannot start or go on; the message says what happened and what is left."""
