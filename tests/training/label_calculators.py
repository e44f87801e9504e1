"""Calculators for the tests of `label`: factories named as ``tests.training.label_calculators:NAME``."""

import os
import signal

from ase.calculators.emt import EMT

from training.label.errors import NotTrustedError


class CountingEMT(EMT):
    """Effective-medium theory that counts its evaluations over all instances, and is interrupted or killed on demand."""

    evaluations = 0
    fail_after: int | None = None
    kill_after: int | None = None

    def calculate(self, *arguments, **keywords):
        """Evaluate, or be stopped from outside."""
        cls = type(self)
        if cls.kill_after == cls.evaluations:
            os.kill(os.getpid(), signal.SIGKILL)
        if cls.fail_after is not None and cls.evaluations >= cls.fail_after:
            raise KeyboardInterrupt
        cls.evaluations += 1
        super().calculate(*arguments, **keywords)


class BrokenEMT(CountingEMT):
    """Always fails, as a program that is not installed does."""

    def calculate(self, *arguments, **keywords):
        """Raise."""
        raise RuntimeError("the program was not found")


class EMTWithoutNitrogen(EMT):
    """Cannot do one element."""

    def calculate(self, atoms=None, *arguments, **keywords):
        """Evaluate, or raise."""
        if 7 in atoms.numbers:
            raise RuntimeError("no nitrogen")
        super().calculate(atoms, *arguments, **keywords)


class ShyEMT(CountingEMT):
    """Trusts itself once."""

    def calculate(self, *arguments, **keywords):
        """Evaluate the first frame only."""
        super().calculate(*arguments, **keywords)
        if ShyEMT.evaluations > 1:
            raise NotTrustedError("not today")


def no_forces():
    """A calculator of energies alone."""
    calculator = EMT()
    calculator.implemented_properties = ["energy"]
    return calculator
