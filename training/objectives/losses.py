"""The formulas, on tensors of one value a pair or row. No model, no batch, no division by anything.

Notation: lp sum of log p over the answer's tokens, n their number; c, r chosen and rejected; d = (lp_c - ref_c) -
(lp_r - ref_r); b beta; e label smoothing; ls log sigmoid.

    dpo   sigmoid   -(1 - e) ls(b d) - e ls(-b d)                      Rafailov et al. 2023, arXiv 2305.18290; e: Mitchell 2023
          hinge     max(0, 1 - b d)                                    Zhao et al. 2023, arXiv 2305.10425
          ipo       ((lp_c - ref_c)/n_c - (lp_r - ref_r)/n_r - 1/(2b))^2      Azar et al. 2023, arXiv 2310.12036
    cpo   the same with d = lp_c - lp_r (ipo: per token)               Xu et al. 2024, arXiv 2401.08417
    simpo -ls(b (lp_c/n_c - lp_r/n_r) - gamma)                         Meng et al. 2024, arXiv 2405.14734
    orpo  -b ls(log odds_c - log odds_r), log odds = m - log(1 - exp m), m = lp/n      Hong et al. 2024, arXiv 2403.07691
    kto   label true w_d (1 - s(b (lp - ref - kl))), false w_u (1 - s(b (kl - (lp - ref))))      arXiv 2402.01306
    reward  -ls(s_c - s_r) + center (s_c + s_r)^2

TRL 1.16's dpo ignores label smoothing in its sigmoid loss; here it is the conservative DPO that the name says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def preference(kind: str, difference: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[P] from d [P]; `kind` sigmoid, hinge or ipo (which wants d per token)."""
    if kind == "hinge":
        return torch.relu(1 - beta * difference)
    if kind == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * F.logsigmoid(beta * difference) - label_smoothing * F.logsigmoid(-beta * difference)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-ls of the log odds ratio [P], from mean log-probabilities [P] below 0."""
    return -F.logsigmoid((chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected)))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp x) for x < 0 without losing digits on either side (Maechler 2012): expm1 near 0, log1p far from it. Where
    the mean log-probability is 0 to fp32 the odds are infinite; it is held one step of fp32 away from that."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453
    # Each branch sees values that are harmless to its gradient where the other is taken: 0 times infinity is not 0.
    low, high = torch.where(near, torch.full_like(x, -1.0), x), torch.where(near, x, torch.full_like(x, -0.5))
    return torch.where(near, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


def kto(difference: Tensor, labels: Tensor, divergence: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """[N] from lp - ref [N], labels bool [N] and the estimate of the divergence, a scalar; weights (true, false)."""
    signed = torch.where(labels, difference - divergence, divergence - difference)
    weight = torch.where(labels, weights[0], weights[1])
    return weight * (1 - torch.sigmoid(beta * signed))


def bradley_terry(chosen: Tensor, rejected: Tensor, center: float) -> Tensor:
    """[P] from scores [P]."""
    return -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2


def won(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[P]: 1 where the chosen one is ahead, half where neither is (before the first step no one is)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
