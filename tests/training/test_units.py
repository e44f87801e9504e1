import pytest
from openmm import unit

from training.units import ANGSTROM_PER_NM, KCAL_PER_MOL_PER_EV, KJ_PER_MOL_PER_EV, energy_factor, force_factor, length_factor


def test_factors_agree_with_openmm():
    electronvolt = unit.elementary_charge * unit.volt * unit.AVOGADRO_CONSTANT_NA
    assert electronvolt.value_in_unit(unit.kilojoule_per_mole) == pytest.approx(KJ_PER_MOL_PER_EV, rel=1e-6)
    assert electronvolt.value_in_unit(unit.kilocalorie_per_mole) == pytest.approx(KCAL_PER_MOL_PER_EV, rel=1e-6)
    assert (1 * unit.nanometer).value_in_unit(unit.angstrom) == pytest.approx(ANGSTROM_PER_NM, rel=1e-12)


def test_named_units():
    assert energy_factor("Hartree") == pytest.approx(27.211386, rel=1e-7)
    assert energy_factor("hartree") == energy_factor("Ha")
    assert energy_factor("kcal/mol") * KCAL_PER_MOL_PER_EV == pytest.approx(1.0, rel=1e-12)
    assert length_factor("nm") == pytest.approx(10.0)
    assert force_factor("kcal/mol/Angstrom") == pytest.approx(energy_factor("kcal/mol"))
    assert force_factor("Hartree/Bohr") == pytest.approx(51.422067, rel=1e-6)


@pytest.mark.parametrize(
    ("function", "unit_name"), [(energy_factor, "cal"), (length_factor, "feet"), (force_factor, "eV"), (force_factor, "eV/mile")]
)
def test_unknown_units_are_refused(function, unit_name):
    with pytest.raises(ValueError, match="unit"):
        function(unit_name)
