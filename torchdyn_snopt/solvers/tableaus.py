"""Butcher tableaus of the explicit Runge–Kutta methods, as data.

A step from (t, x) by dt evaluates kᵢ = F(t + cᵢ dt, x + dt Σⱼ aᵢⱼ kⱼ) and yields x + dt Σᵢ bᵢ kᵢ;
dt Σᵢ eᵢ kᵢ estimates the local error. A method has the FSAL property when its last stage is
evaluated at the step's result, so that the next step needs no new first stage.

Sources: Dormand & Prince 1980 (dopri5), Prince & Dormand 1981 (dopri8), Tsitouras 2011 (tsit5),
Bogacki & Shampine 1989 (bosh3), Kutta 1901 (rk4, rk4_38), Heun 1900 (heun, heun3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from torchdyn_snopt.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """One explicit Runge–Kutta method.

    Attributes:
        name: canonical name.
        order: order of the solution Σ bᵢ kᵢ.
        c: nodes, one for each stage; ``c[0] = 0``.
        a: strictly lower rows; row i has i entries.
        b: weights of the solution (the quadrature weights of every time integral).
        e: weights of the error estimate, or None for a method without one (fixed steps).
        mid: weights of the solution at the middle of the step, or None; for dense output.
        fsal: whether the last stage is evaluated at the step's result.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    e: Row | None = None
    mid: Row | None = None
    _cache: dict[tuple[torch.dtype, torch.device], Coefficients] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def stages(self) -> int:
        """Number of stages, the FSAL one included."""
        return len(self.c)

    @property
    def fsal(self) -> bool:
        """Whether the last stage is evaluated at the step's result."""
        return self.stages > 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0.0

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error and so can choose its steps."""
        return self.e is not None

    def coefficients(self, like: Tensor) -> Coefficients:
        """The rows as tensors of ``like``'s dtype on its device (made once for each pair)."""
        key = (like.dtype, like.device)
        if key not in self._cache:
            self._cache[key] = Coefficients(self, like)
        return self._cache[key]


class Coefficients:
    """A tableau's rows as tensors, ready for one matrix-vector product over the stages."""

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        """Make the tensors.

        Args:
            tableau: the method.
            like: a tensor whose dtype and device are used.
        """

        def tensor(row: Row) -> Tensor:
            return torch.tensor(row, dtype=like.dtype, device=like.device)

        self.a = [tensor(row) for row in tableau.a]
        self.b = tensor(tableau.b)
        self.e = None if tableau.e is None else tensor(tableau.e)
        self.mid = None if tableau.mid is None else tensor(tableau.mid)


def _difference(b: Row, b_hat: Row) -> Row:
    return tuple(x - y for x, y in zip(b, b_hat, strict=True))


EULER = Tableau("euler", 1, c=(0.0,), a=((),), b=(1.0,))

MIDPOINT = Tableau("midpoint", 2, c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0))

HEUN = Tableau("heun", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5))

HEUN_ADAPTIVE = Tableau(
    "adaptive_heun", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5), e=(-0.5, 0.5)
)

HEUN3 = Tableau(
    "heun3",
    3,
    c=(0.0, 1 / 3, 2 / 3),
    a=((), (1 / 3,), (0.0, 2 / 3)),
    b=(1 / 4, 0.0, 3 / 4),
)

RK4 = Tableau(
    "rk4",
    4,
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)

RK4_38 = Tableau(
    "rk4_38",
    4,
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

_BOSH3_B = (2 / 9, 1 / 3, 4 / 9, 0.0)
BOSH3 = Tableau(
    "bosh3",
    3,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=_BOSH3_B,
    e=_difference(_BOSH3_B, (7 / 24, 1 / 4, 1 / 3, 1 / 8)),
)

_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
DOPRI5 = Tableau(
    "dopri5",
    5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B[:-1],
    ),
    b=_DOPRI5_B,
    e=_difference(
        _DOPRI5_B,
        (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
    ),
    mid=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)

_TSIT5_B = (
    0.09646076681806522951816731316512876333711995238157997181903319,
    1 / 100,
    0.4798896504144995747752495322905965199130404621990332488332634944,
    1.379008574103741893192274821856872770756462643091360525934940067,
    -3.290069515436080679901047585711363850115683290894936158531296799,
    2.324710524099773982415355918398765796109060233222962411944060046,
    0.0,
)
TSIT5 = Tableau(
    "tsit5",
    5,
    c=(
        0.0,
        161 / 1000,
        327 / 1000,
        9 / 10,
        0.9800255409045096857298102862870245954942137979563024768854764293,
        1.0,
        1.0,
    ),
    a=(
        (),
        (161 / 1000,),
        (
            -0.00848065549235698854442687425023077467512117739343039153736923,
            0.3354806554923569885444268742502307746751211773934303915373692342,
        ),
        (
            2.897153057105493432130432594192938764924887287701866490314866693,
            -6.359448489975074843148159912383825625952700647415626703305928850,
            4.362295432869581411017727318190886861027813359713760212991062156,
        ),
        (
            5.325864828439256604428877920840511317836476253097040101202360397,
            -11.74888356406282787774717033978577296188744178259862899288666928,
            7.495539342889836208304604784564358155658679161518186721010132816,
            -0.09249506636175524925650207933207191611349983406029535244034750,
        ),
        (
            5.861455442946420028659251486982647890394337666164814434818157239,
            -12.92096931784710929170611868178335939541780751955743459166312250,
            8.159367898576158643180400794539253485181918321135053305748355423,
            -0.07158497328140099722453054252582973869127213147363544882721139,
            -0.02826905039406838290900305721271224146717633626879770007617876,
        ),
        _TSIT5_B[:-1],
    ),
    b=_TSIT5_B,
    e=_difference(
        _TSIT5_B,
        (
            0.09468075576583945807478876255758922856117527357724631226139574,
            0.009183565540343253096776363936645313759813746240984095238905939,
            0.4877705284247615707855642599631228241516691959761363774365216240,
            1.234297566930478985655109673884237654035539930748192848315425833,
            -2.707712349983525454881109975059321670689605166938197378763992255,
            1.866628418170587035753719399566211498666255505244122593996591602,
            1 / 66,
        ),
    ),
)

_DOPRI8_B = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
_DOPRI8_B_HAT = (
    13451932 / 455176623,
    0.0,
    0.0,
    0.0,
    0.0,
    -808719846 / 976000145,
    1757004468 / 5645159321,
    656045339 / 265891186,
    -3867574721 / 1518517206,
    465885868 / 322736535,
    53011238 / 667516719,
    2 / 45,
    0.0,
)
DOPRI8 = Tableau(
    "dopri8",
    8,
    c=(
        0.0,
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1.0,
        1.0,
    ),
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            29443841 / 614563906,
            0.0,
            0.0,
            77736538 / 692538347,
            -28693883 / 1125000000,
            23124283 / 1800000000,
        ),
        (
            16016141 / 946692911,
            0.0,
            0.0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0.0,
            0.0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0.0,
            0.0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0.0,
            0.0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0.0,
            0.0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0.0,
            0.0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0.0,
        ),
    ),
    b=_DOPRI8_B,
    e=_difference(_DOPRI8_B, _DOPRI8_B_HAT),
)

TABLEAUS = {
    tableau.name: tableau
    for tableau in (
        EULER,
        MIDPOINT,
        HEUN,
        HEUN_ADAPTIVE,
        HEUN3,
        RK4,
        RK4_38,
        BOSH3,
        DOPRI5,
        TSIT5,
        DOPRI8,
    )
}

# What each host calls these methods. torchdiffeq's 'rk4' is Kutta's 3/8 rule.
TORCHDYN_NAMES = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun": HEUN,
    "rk4": RK4,
    "rk-4": RK4,
    "RungeKutta4": RK4,
    "bosh3": BOSH3,
    "dopri5": DOPRI5,
    "DormandPrince45": DOPRI5,
    "DormandPrince5": DOPRI5,
    "tsit5": TSIT5,
    "Tsitouras45": TSIT5,
    "Tsitouras5": TSIT5,
    "dopri8": DOPRI8,
}
TORCHDIFFEQ_NAMES = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun2": HEUN,
    "heun": HEUN,
    "adaptive_heun": HEUN_ADAPTIVE,
    "heun3": HEUN3,
    "rk4": RK4_38,
    "bosh3": BOSH3,
    "dopri5": DOPRI5,
    "tsit5": TSIT5,
    "dopri8": DOPRI8,
}


def tableau_named(name: str, names: dict[str, Tableau] | None = None) -> Tableau:
    """Look a method up by name.

    Args:
        name: a key of ``names``.
        names: one host's names; the canonical ones by default.

    Returns:
        The tableau.

    Raises:
        InvalidInputError: the name is unknown.
    """
    known = TABLEAUS if names is None else names
    if name not in known:
        raise InvalidInputError(
            "unknown Runge–Kutta method",
            got=f"{name!r}",
            allowed=", ".join(sorted(known)),
            do="choose one of these names",
        )
    return known[name]
