"""From files of quantum chemistry to packed, memory-mapped data sets."""
