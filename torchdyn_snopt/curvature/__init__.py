"""Curvature: layers' inputs and output gradients become the Kronecker factors A and B (Eq. 13).

This room knows nothing of solvers or optimizers.
"""
