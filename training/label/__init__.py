"""`label`: from structures to labelled training data.

::

    SMILES, structure files -> geometries -> candidates (dynamics, displacements, dimers) -> [committee picks] -> labels -> HDF5

Candidates and labels are kept in a journal beside the output from the moment they exist, so a killed run goes on where it stood.
"""
