"""The N-body experiment: where do five charged particles go? The layers of the potential, another task.

Lengths, times, masses, charges and the Coulomb constant are pure numbers here, all of the order of one, as in the published experiment.
"""
