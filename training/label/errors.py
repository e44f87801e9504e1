"""The errors that all of `training.label` shares."""


class LabelError(ValueError):
    """Structures, a calculator or a committee cannot be used; the message says what was expected, what came and what to do."""


class NotTrustedError(ValueError):
    """For calculators to raise on a frame that they do not trust themselves with: it is left out, which is no fault of the calculator."""
