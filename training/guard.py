"""What stops a training that has gone astray: too many unusable batches in a row end it with a message that says what to do."""


class NonFiniteTraining(RuntimeError):
    """The weights have diverged: batch after batch had a loss or gradient that is not finite, or predictions that are exactly zero."""


class BatchGuard:
    """Counts the batches in a row that had something wrong.

    A single one may be the fault of a label and is passed over; many in a row are the fault of the weights, and steps no longer mend them.

    Parameters
    ----------
    fault : str
        What is counted, as in "20 batches in a row {fault}".
    """

    MAX_IN_A_ROW = 20

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.in_a_row = 0

    def see(self, at_fault: bool, step: int) -> None:
        """Count a batch, taken at an optimizer step.

        Raises
        ------
        NonFiniteTraining
            At the last of `MAX_IN_A_ROW` batches in a row that were at fault.
        """
        self.in_a_row = self.in_a_row + 1 if at_fault else 0
        if self.in_a_row >= self.MAX_IN_A_ROW:
            raise NonFiniteTraining(
                f"step {step}: {self.in_a_row} batches in a row {self.fault}; the weights have diverged. "
                "Start a new run with a lower learning_rate or a stricter gradient_clip."
            )
