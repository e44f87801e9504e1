"""From files of quantum chemistry to packed, memory-mapped data sets, and from these to batches.

::

    hdf5, extxyz       files to frames, which `frames` describes
    prepare            frames of all files to one data set, with the choices of the command line
    packing, packed    writes a data set; reads it
    self_energy        the energy of each element, which is subtracted
    splits, molecules  which frames are held out; which molecules a frame holds
    summary            what `prepare` prints
    batches            frames of a data set to a batch with neighbours
"""
