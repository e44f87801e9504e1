"""What is predicted from what, on how many trajectories: the thesis' protocol and that of the EGNN paper."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Protocol:
    """One way to pose the question.

    Attributes
    ----------
    trajectories : dict
        Number of trajectories of the splits ``train``, ``validation`` and ``test``, which follow one another in the data.
    steps_ahead : int
        Steps from the known positions and velocities to the positions asked for.
    start_step : int or None
        Where the known ones are taken; None for any saved step, drawn anew for each trajectory in every epoch, once for all in testing.
    printed : dict
        Mean squared errors that were published for it.
    """

    trajectories: dict[str, int]
    steps_ahead: int
    start_step: int | None
    printed: dict[str, float] = field(default_factory=dict)

    @property
    def n_trajectories(self) -> int:
        """All splits together."""
        return sum(self.trajectories.values())


PROTOCOLS: dict[str, Protocol] = {
    # Hedelius (2021). It does not say where a trajectory is entered, nor how many trajectories tested: any frame, and 2,000.
    "thesis": Protocol(
        {"train": 46_000, "validation": 2_000, "test": 2_000},
        steps_ahead=500,
        start_step=None,
        printed={"SE(3)-Transformer, thesis": 0.0389, "SE(3)-Transformer, code of its authors": 0.0511},
    ),
    # Satorras, Hoogeboom, Welling (2021), table 2; their 31st saved frame is step 3,100.
    "egnn": Protocol(
        {"train": 3_000, "validation": 2_000, "test": 2_000},
        steps_ahead=1_000,
        start_step=3_100,
        printed={"linear": 0.0819, "SE(3)-Transformer": 0.0244, "TFN": 0.0155, "GNN": 0.0107, "radial field": 0.0104, "EGNN": 0.0071},
    ),
}
