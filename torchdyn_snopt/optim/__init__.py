"""SNOpt, its preconditioners and its trust region.

This room knows nothing of ODEs: it reads curvature from the registry only.
"""
