"""What `prepare` tells of the data set that it made, and what in it to look at."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from training.data.packed import PackedDataset
from training.data.packing import STRANGE_FORCES
from training.data.self_energy import suspicious_unit
from training.units import KCAL_PER_MOL_PER_EV

_DOUBT = "bold yellow"


def print_summary(dataset: PackedDataset, tested_on_parts: int, console: Console) -> None:
    """Print statistics, units, self-energies and splits, with what is doubtful in each.

    Parameters
    ----------
    dataset : PackedDataset
        Just made.
    tested_on_parts : int
        As `PackedDataset.frames_tested_on_parts`, which takes time; 0 where they were left out.
    console : Console
        Where to print.
    """
    m = dataset.metadata
    _print_energies_and_forces(m["statistics"], console)
    units = ", ".join(f"{name} in {unit}" for name, unit in m["units_read"].items())
    console.print(f"read: {units}", highlight=False)
    doubt = suspicious_unit(m)
    if doubt is not None:
        console.print(doubt, style=_DOUBT, highlight=False)
    listed = ", ".join(f"{s} {e:.6f}" for s, e in m["self_energies"].items())
    console.print(f"self-energies in eV ({m['self_energies_origin']}): {listed}", highlight=False)
    if not m["self_energies_determined"]:
        note = "the formulas are too few to tell the elements apart: these self-energies mean something in sums alone"
        console.print(f"{note}; give others by --self-energies or --align-to", style=_DOUBT, highlight=False)
    frames = ", ".join(f"{s} {n:,}" for s, n in m["split_frames"].items())
    if m.get("hold_out_molecules"):
        of_splits = ", ".join(f"{s} {n:,}" for s, n in m["left_out_of"].items())
        frames += f", left out {m['left_out_frames']:,}, which have a held-out molecule ({of_splits})"
    console.print(f"{m['n_frames']:,} frames of {len(m['formulas']):,} formulas: {frames}", highlight=False)
    for note in _doubts_of_splits(dataset, tested_on_parts):
        console.print(note, style=_DOUBT, highlight=False)
    for shift in m.get("level_shifts", []):
        console.print(_line_of_shift(shift, m["aligned_to"]), highlight=False, markup=False)
    for reason, n in m["skipped"].items():
        console.print(f"skipped {n:,} frames: {reason}", highlight=False)


def _print_energies_and_forces(statistics: dict[str, Any], console: Console) -> None:
    table = Table("energies (kcal/mol)", "mean", "standard deviation", title="before and after subtracting self-energies (Table 3.1 of the thesis)")
    for label, key in (("total", "total"), ("without self-energies", "residual"), ("without self-energies, per atom", "residual_per_atom")):
        table.add_row(label, *(f"{statistics[key][k] * KCAL_PER_MOL_PER_EV:,.3f}" for k in ("mean", "std")))
    console.print(table)
    if "force_rms" in statistics:
        console.print(f"force components: root mean square {statistics['force_rms'] * KCAL_PER_MOL_PER_EV:.3f} kcal/mol/Å", highlight=False)
        strange = statistics["strange_forces"]
        if strange:
            note = f"{strange:,} frames have forces {STRANGE_FORCES:g} times as large as usual (the first: {statistics['first_strange_forces']})"
            console.print(f"{note}; they are not among the root mean square, but are trained on: look at them", style=_DOUBT, highlight=False)


def _doubts_of_splits(dataset: PackedDataset, tested_on_parts: int) -> Iterator[str]:
    """What errors on a split would not say: it is empty, or of molecules that are trained on."""
    m = dataset.metadata
    left_out_of = m.get("left_out_of", {})
    for split, fraction in m["split_fractions"].items():
        if fraction > 0 and not m["split_frames"][split]:
            remedy = "give other fractions, or split frame by frame with --split-by frame"
            if m["split_by"] == "frame":
                remedy = "there are too few frames"
            if left_out_of.get(split):
                remedy = "every frame of it has a molecule of the test split; give other fractions"
            yield f"the {split} split is empty, though {fraction:g} was asked for: {remedy}"
    for split, files in m["split_files"].items():
        if files and not m["split_frames"][split]:
            reason = "every frame of its files has a molecule of the test split" if left_out_of.get(split) else "its files hold no usable frame"
            yield f"the {split} split is empty: {reason}; give other files"
        known = dataset.frames_of_trained_formulas(split) if files else 0
        if known:
            note = f"{split}: {known:,} of {m['split_frames'][split]:,} frames are of formulas that are trained on, too"
            yield f"{note}; errors there are those on known molecules"
    if tested_on_parts:
        note = f"test: {tested_on_parts:,} of {m['split_frames']['test']:,} frames are of molecules that are trained on in pairs or clusters"
        yield f"{note}, whose formulas are others; errors there are not those on unseen molecules: --hold-out-molecules leaves those pairs out"


def _line_of_shift(shift: dict[str, Any], aligned_to: str) -> str:
    parts = ", ".join(f"{symbol} {e:.4f}" for symbol, e in shift["per_element_ev"].items())
    before, after = (shift["rms_per_atom_ev"][k] * KCAL_PER_MOL_PER_EV for k in ("before", "after"))
    level = f" ({shift['level_of_theory']})" if shift["level_of_theory"] else ""
    taken = f"; taken for {', '.join(shift['taken_for'])} too" if shift["taken_for"] else ""
    errors = f"RMS per atom {before:.3f}, after that {after:.3f} kcal/mol"
    return f"{shift['source']}{level} against {aligned_to} in eV: {parts}; {errors}{taken}"
