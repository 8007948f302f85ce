"""Linear probes: what can be read off an activation by a linear rule, and how well on other texts.

Logistic regression with an L2 penalty on standardised activations, judged on texts that were held
out. G. Alain and Y. Bengio, Understanding intermediate layers using linear classifier probes, 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import UsageError


@dataclass(frozen=True, slots=True)
class Probe:
    """A trained probe. classes: [C]; weight: float32 [C, D] and bias: [C] act on raw activations.

    accuracy: on held-out samples; baseline: of always naming their most frequent class; balanced:
    mean over the classes of the share that is right. trained, held_out: how many samples.
    """

    classes: tuple[str, ...]
    weight: Array
    bias: Array
    accuracy: float
    baseline: float
    balanced: float
    trained: int
    held_out: int

    def predict(self, activations: Array) -> list[str]:
        """The class of each row. activations: [N, D]."""
        scores = activations @ self.weight.T + self.bias
        return [self.classes[i] for i in np.argmax(scores, axis=-1)]

    def summary(self) -> str:
        """One sentence."""
        return (
            f"{self.accuracy:.1%} right on {self.held_out} held-out samples ({self.baseline:.1%} by "
            f"naming the most frequent class), trained on {self.trained}"
        )


def train_probe(
    activations: Array,
    labels: Sequence[str],
    *,
    held_out: float = 0.25,
    penalty: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Train on some samples of each class and judge on the others.

    activations: float [N, D]; labels: [N]. held_out: share of each class kept away from training.
    penalty: of the squared weights, divided by the number of samples. Raises UsageError for fewer
    than two classes, or a class with fewer than two samples.
    """
    x = np.asarray(activations, np.float64)
    if x.ndim != 2 or len(x) != len(labels):
        raise UsageError(f"{len(labels)} labels do not go with activations {list(x.shape)}")
    if not 0 < held_out < 1:
        raise UsageError(f"a held-out share of {held_out:g} must be between 0 and 1")
    classes = tuple(sorted(set(labels)))
    y = np.array([classes.index(label) for label in labels])
    train, test = _split(y, classes, held_out, seed)
    mean, deviation = x[train].mean(0), x[train].std(0)
    deviation = np.where(deviation > 1e-8 * (deviation.max() or 1.0), deviation, np.inf)
    weight, bias = _fit((x[train] - mean) / deviation, y[train], len(classes), penalty)
    raw = weight / deviation
    offset = bias - raw @ mean
    said = np.argmax(x[test] @ raw.T + offset, axis=-1)
    right = said == y[test]
    counts = np.bincount(y[test], minlength=len(classes))
    return Probe(
        classes, raw.astype(np.float32), offset.astype(np.float32),
        accuracy=float(right.mean()), baseline=float(counts.max() / counts.sum()),
        balanced=float(np.mean([right[y[test] == c].mean() for c in range(len(classes))])),
        trained=len(train), held_out=len(test),
    )  # fmt: skip


def _split(
    y: Array, classes: Sequence[str], held_out: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out samples, each class in proportion."""
    if len(classes) < 2:
        raise UsageError(f"a probe tells classes apart, and there is only {', '.join(classes)!r}")
    rng = np.random.default_rng(seed)
    train: list[int] = []
    test: list[int] = []
    for number, name in enumerate(classes):
        own = rng.permutation(np.flatnonzero(y == number)).tolist()
        if len(own) < 2:
            raise UsageError(f"class {name!r} has one sample; give at least 2, better 20, of each")
        cut = min(max(1, round(held_out * len(own))), len(own) - 1)
        test += own[:cut]
        train += own[cut:]
    return train, test


def _fit(x: Array, y: Array, classes: int, penalty: float) -> tuple[Array, Array]:
    """Weights [C, D] and bias [C] of the smallest mean cross-entropy plus penalty |W|^2 / (2 N)."""
    n, d = x.shape
    onehot = np.eye(classes)[y]

    def loss(flat: Array) -> tuple[float, Array]:
        w, b = flat[: classes * d].reshape(classes, d), flat[classes * d :]
        z = x @ w.T + b
        z -= z.max(-1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        slope = (np.exp(log_p) - onehot) / n
        value = -(onehot * log_p).sum() / n + penalty * (w * w).sum() / (2 * n)
        return float(value), np.concatenate([(slope.T @ x + penalty * w / n).ravel(), slope.sum(0)])

    # Imported where it is used: SciPy would take a part of every start.
    from scipy.optimize import minimize

    found = minimize(loss, np.zeros(classes * (d + 1)), jac=True, method="L-BFGS-B",
                     options={"maxiter": 500})  # fmt: skip
    return found.x[: classes * d].reshape(classes, d), found.x[classes * d :]
