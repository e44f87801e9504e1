"""The error that all of `training.label` shares."""


class LabelError(ValueError):
    """Structures, a calculator or a committee cannot be used; the message says what was expected, what came and what to do."""
