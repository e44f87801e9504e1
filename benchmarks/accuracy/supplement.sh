#!/bin/bash
# Data that dynamics never visits, which mend walls, bond breaking, torsions and bends of a model: what was added to the data of se3-ani1x.
#
#   benchmarks/accuracy/supplement.sh OUTPUT_FOLDER PACKED TEST.h5
#
# PACKED is the data set whose split into training and validation is kept, TEST.h5 the file of the test set; no formula that either holds out
# is labelled. Needs PySCF 2.14 and torchani 2.2.4. A file that is there is not made again, and a broken run is resumed: give the same
# command again. Packed together with the other data, twice for a weight of two:
#
#   python -m training prepare train.h5 OUTPUT_FOLDER/*.h5 OUTPUT_FOLDER/*.h5 --validation 0.02 --self-energies PACKED --output packed-all
set -e
OUT=$1
HOLD="--hold-out $2 --hold-out $3"
mkdir -p "$OUT"

make() {  # make NAME CALCULATOR ARGUMENTS...
    local file=$OUT/$1.h5 teacher=$2 level="wB97X/6-31G(d)"
    [ "$teacher" = DFT ] || level="ANI-1x ensemble (8 networks, torchani 2.2.4), a surrogate of wB97X/6-31G(d)"
    shift 2
    [ -f "$file" ] && return
    python -m training label --frames 0 --displacements 0 $HOLD --output "$file" --calculator "benchmarks.accuracy.teachers:$teacher" \
        --level-of-theory "$level" $([ -f "$file.journal" ] && echo --resume) "$@"
}

# Where the eight networks agree: torsions all the way round, bends, moderate stretches, contacts of small molecules.
HERE=benchmarks/accuracy
make torsions ANI1xEnsemble $HERE/torsions.smi --temperature 300 --torsions 25 --seed 1
make bends ANI1xEnsemble $HERE/small.smi $HERE/torsions.smi --conformers 1 --temperature 300 --bends 15 --stretches 20 --seed 2
make water ANI1xEnsemble O --conformers 1 --temperature 300 --temperature 1000 --bends 120 --stretches 80 --dimers 500 --contacts 1.2 4.0 --seed 3
make contacts ANI1xEnsemble $HERE/small.smi --conformers 1 --temperature 300 --dimers 3000 --contacts 1.2 3.0 --seed 4
# The networks have never seen H2 and push it apart at rest; their disagreement says so, but not within the wider limits here: no H2 below.
# On the repulsive wall the networks disagree by a tenth of energies of hundreds of kJ/mol, and their mean follows DFT within some percent.
WALL="--option max_force_std=1.5 --option max_energy_std=0.3 --conformers 1 --contacts 0.9 2.2"
make methanes ANI1xEnsemble C $WALL --temperature 300 --dimers 400 --bends 60 --seed 6
make walls ANI1xEnsemble O C N CC CO CN $WALL --dimers 900 --seed 7
make alkanes ANI1xEnsemble CCCC CCC CCCCC "CC(C)C" --conformers 3 --temperature 100 --temperature 600 --torsions 30 --dimers 300 --contacts 1.2 4.0 --seed 5

# Broken bonds and hard contacts of the smallest molecules: DFT itself, where the networks were not trained.
make dft-water DFT O --conformers 1 --temperature 300 --temperature 1000 --stretches 25 --bends 15
make dft-radicals DFT benchmarks/accuracy/radicals.xyz --temperature 300 --temperature 1000 --displacements 3
make dft-methanes DFT C --conformers 1 --temperature 300 --dimers 40 --contacts 0.9 2.4
for smiles in "[H][H]" C N CO CC OO; do
    make "dft-$smiles" DFT "$smiles" --conformers 1 --temperature 300 --temperature 1000 --stretches 15 --bends 4
done
make dft-waters DFT O --conformers 1 --temperature 300 --dimers 60 --contacts 1.0 2.4
make dft-mixed DFT O C N "[H][H]" --conformers 1 --dimers 60 --contacts 1.0 2.4
for smiles in CN NN NO; do
    make "dft-$smiles" DFT "$smiles" --conformers 1 --temperature 300 --temperature 1000 --stretches 12 --bends 3
done
# Against DFT the networks bend water 11% too stiffly, hydrogen cyanide at half its frequency, umbrella ammonia 11% too stiffly, wag formaldehyde 12%
# and bend methane 4 to 7% too softly (`benchmarks/accuracy/small_molecules.py`). DFT is in their place:
#   python -m benchmarks.accuracy.without train.h5 train-without.h5 H2O CHN NH3 CH4 CH2O, and likewise of the files above those that each holds
for smiles in "C#N" "C=O"; do
    make "dft-$smiles" DFT "$smiles" --conformers 1 --temperature 300 --temperature 1000 --stretches 20 --bends 15
done

# Ring systems of medicinal chemistry with substituents, for breadth; the released model drives the dynamics.
python -m benchmarks.accuracy.rings > "$OUT/rings.smi"
make rings ANI1xEnsemble "$OUT/rings.smi" --conformers 1 --temperature 300 --temperature 700 --frames 2 --displacements 2 --torsions 1 --seed 9 \
    --sampler openmm_se3:SE3Calculator --sampler-option forces=direct --sampler-option precision=single

# From here on for models to come: not in the data of the released weights. First, bonds pulled apart further than `--stretches` goes.
python -m benchmarks.accuracy.scans O "[H][H]" C N CC CO CN CCO OO NN > "$OUT/scans.xyz"
make dft-scans DFT "$OUT/scans.xyz" --max-force 4000

# Contacts so hard that a model without them makes up holes in its repulsive walls; forces of thousands of kcal/mol/Angstrom.
make dft-methane-walls DFT C --conformers 1 --dimers 45 --contacts 0.5 1.3 --max-force 4000 --seed 21
make dft-walls DFT O C N --conformers 1 --dimers 90 --contacts 0.5 1.2 --max-force 4000 --seed 22
make dft-hydrogen-walls DFT O C "[H][H]" --conformers 1 --dimers 40 --contacts 0.4 1.2 --max-force 4000 --seed 23

# More of such ring systems, and the same ones again, from displaced geometries, which cost no dynamics.
python -m benchmarks.accuracy.rings --variants 20 --seed 1 | grep -vxFf "$OUT/rings.smi" | shuf --random-source=<(yes) > "$OUT/more-rings.smi"
DISPLACED="--temperature 300 --temperature 800 --displacements 3"
make more-rings ANI1xEnsemble "$OUT/more-rings.smi" $DISPLACED --conformers 1 --seed 11
make displaced-rings ANI1xEnsemble "$OUT/rings.smi" $DISPLACED --conformers 2 --torsions 1 --seed 12
