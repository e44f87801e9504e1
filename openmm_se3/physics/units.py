"""Conversion factors of the measures, all from CODATA constants. Inside: nm, ps, kJ/mol, dalton; in reports also Angstrom and 1/cm."""

from ase import units
from scipy import constants

ANGSTROM_PER_NM = units.nm / units.Ang
KJ_PER_MOL_PER_HARTREE = units.Hartree * units.mol / units.kJ
#: Boltzmann's constant, kJ/mol/K.
BOLTZMANN = units.kB * units.mol / units.kJ
#: Wavenumber, 1/cm, of an angular frequency of 1 rad/ps, in which the root of kJ/mol/nm^2/dalton comes.
PER_CM_PER_RAD_PER_PS = constants.centi / (constants.pico * 2 * constants.pi * constants.c)
#: Mass, dalton, of 1 nm^3 at 1 kg/m^3.
DALTON_PER_KG_PER_M3_NM3 = constants.nano**3 / constants.atomic_mass
