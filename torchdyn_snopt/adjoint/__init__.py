"""The adjoint: forward solve, augmented backward solve, gradients for x0, θ and every t.

This room knows nothing of optimizers or of torchdyn.
"""
