"""ASE calculators by name, or from any importable factory."""

import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ase.calculators.calculator import Calculator, get_calculator_class, names

from training.label.errors import LabelError


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Keyword arguments from ``key=value`` texts; a value is read as JSON where it is JSON, else as text.

    Raises
    ------
    LabelError
        For a text without ``=``.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key.isidentifier():
            raise LabelError(f"a calculator's option must read key=value, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def calculator_factory(specification: str, options: dict[str, Any]) -> Callable[[], Calculator]:
    """What makes a fresh calculator each time it is called; the first one is made, and thrown away, at once to see that it works.

    Parameters
    ----------
    specification : str
        Name of a calculator of ASE, such as ``emt``, ``orca``, ``psi4``, or ``module:factory``, such as ``openmm_se3:SE3Calculator``,
        where the factory is any callable that returns an ASE calculator.
    options : dict
        Keyword arguments for it.

    Raises
    ------
    LabelError
        If there is no such calculator, it does not take these options, or it gives no energy or forces.
    """
    module_name, colon, attribute = specification.partition(":")
    try:
        factory = getattr(import_module(module_name), attribute) if colon else get_calculator_class(specification)
    except (ImportError, AttributeError, ValueError) as error:
        where = f"no {attribute!r} in module {module_name!r}" if colon else f"ASE has no calculator {specification!r}"
        raise LabelError(
            f"calculator {specification!r}: {where} ({error}); give module:factory of something importable, or one of {', '.join(names)}"
        ) from None
    try:
        calculator = factory(**options)
    except Exception as error:  # whatever the constructor of somebody's calculator raises
        raise LabelError(f"calculator {specification!r} with options {options}: {type(error).__name__}: {error}") from error
    lacking = [p for p in ("energy", "forces") if p not in getattr(calculator, "implemented_properties", ())]
    if lacking:
        raise LabelError(f"calculator {specification!r} made {type(calculator).__name__}, which gives no {' and no '.join(lacking)}")
    return lambda: factory(**options)
