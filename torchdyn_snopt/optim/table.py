"""The preconditioners of layers, by the names that SNOpt knows them by."""

from __future__ import annotations

from torchdyn_snopt.optim.preconditioners import EKFAC, KFAC, KFEAdam, Preconditioner
from torchdyn_snopt.optim.trust_region import TrustRegion

TABLE: dict[str, Preconditioner] = {
    "trust_region": TrustRegion(),
    "kfe_adam": KFEAdam(),
    "kfac": KFAC(),
    "ekfac": EKFAC(),
}
