"""Measure the distance of predicted distributions from their targets: a value per row, then means over rows."""

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import log_softmax

from raytune_emotion.emotions import class_distances
from raytune_emotion.learn import losses
from raytune_emotion.learn.transport import transport_cost

#: Lower bound of predicted probabilities, so that every metric is finite.
_LEAST = 1e-12


def logits_of(prob_NK: Tensor) -> Tensor:
    """Return logits of predicted probabilities, with a lower bound of these, so that every metric is finite."""
    return prob_NK.clamp_min(_LEAST).log()


def per_sample(logits_BK: Tensor, prob_BK: Tensor, distances_KK: Tensor | None) -> dict[str, Tensor]:
    """Compute every metric of every row, in float64.

    `js` is in bits and in [0, 1], `kl` and `ce` are in nats, `emd` in class steps, `emd_va` in the unit of the
    distances. `clark` and `canberra` count a class without mass on both sides as zero. `accuracy` is one if the most
    probable class is that of the target (the first one, if the target has several). For `cosine`, `intersection` and
    `accuracy` larger is better, for all others smaller.

    Args:
        logits_BK: predictions before the softmax; B may be 0.
        prob_BK: targets, each row non-negative with sum one.
        distances_KK: ground distance of `emd_va`, a metric; None leaves `emd_va` out.

    Returns:
        name -> [B], float64.

    Sources:
        Clark, Canberra, Chebyshev, cosine and intersection as in Geng, Label Distribution Learning, IEEE TKDE 28 (7),
        2016.
    """
    logits_BK, p_BK = logits_BK.double(), prob_BK.double()
    q_BK = log_softmax(logits_BK, -1).exp()
    diff_BK = p_BK - q_BK
    # The sum is 0 only if the difference is 0; the ratio is then 0.
    ratio_BK = diff_BK / (p_BK + q_BK).clamp_min(torch.finfo(torch.float64).tiny)
    values = {
        "js": losses.js(logits_BK, p_BK),
        "kl": losses.kl(logits_BK, p_BK),
        "ce": losses.ce(logits_BK, p_BK),
        "tvd": diff_BK.abs().sum(-1) / 2,
        "mse": losses.mse(logits_BK, p_BK),
        "l1": losses.l1(logits_BK, p_BK),
        "emd": diff_BK.cumsum(-1).abs().sum(-1),
    }
    if distances_KK is not None:
        values["emd_va"] = transport_cost(distances_KK.to(p_BK), diff_BK)
    return values | {
        "chebyshev": diff_BK.abs().amax(-1),
        "clark": ratio_BK.square().sum(-1).sqrt(),
        "canberra": ratio_BK.abs().sum(-1),
        "cosine": (p_BK * q_BK).sum(-1) / (p_BK.norm(dim=-1) * q_BK.norm(dim=-1)),
        "intersection": torch.minimum(p_BK, q_BK).sum(-1),
        "accuracy": (p_BK.argmax(-1) == q_BK.argmax(-1)).double(),
    }


@dataclasses.dataclass
class MetricSums:
    """Sums of metrics on the device, and the count of their rows. They are divided only once."""

    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the metrics of rows.

        Args:
            values: name -> [B], with the same names each time; B may be 0.
        """
        for name, value_B in values.items():
            self.sums[name] = self.sums.get(name, 0) + value_B.double().sum()
        self.count += len(next(iter(values.values())))

    def means(self) -> dict[str, float]:
        """Return the means over the rows of all workers, with one reduction and one transfer to the host."""
        total = torch.stack(list(self.sums.values()))
        total = torch.cat([total, total.new_tensor([self.count])])
        if dist.is_initialized():
            dist.all_reduce(total)
        *sums, count = total.tolist()
        return {name: value / count for name, value in zip(self.sums, sums, strict=True)}


def distances_of(classes: tuple[str, ...]) -> Tensor | None:
    """Return the ground distance of `emd_va`, [K, K]; None if a class has no position in the valence-arousal plane."""
    distances_KK = class_distances(classes)
    return None if distances_KK is None else torch.from_numpy(distances_KK)
