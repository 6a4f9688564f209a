"""Linear probe: how much of the labels a linear classifier reads from frozen image features."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float

from bvl.data.sources import Source
from bvl.errors import ConfigError, DataError
from bvl.evals.base import Cache, EvalResult, Suite, describe, encode_records, provenance
from bvl.evals.classification import (
    LabelTable,
    judge,
    label_table,
    require_outcomes,
)
from bvl.runs import Components

HELD_OUT = 0.2
MAX_ITERATIONS = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(Suite):
    """L2-regularised logistic regression on the pooled image features (before the projection).

    Features are standardised by the training set. The strength is chosen from `l2` by the mean log loss on a fifth
    of the training set, split by group, then all of it is fitted again; the test set is read once, at the end.

    by, multi_label: as in ZeroShot. max_train: take so many training images, drawn by `seed`; None = all.
    """

    train: Source
    test: Source
    by: str = "labels"
    multi_label: bool = False
    max_train: int | None = None
    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    seed: int = 0

    def __post_init__(self):
        if not self.l2 or min(self.l2) <= 0:
            raise ConfigError(f"l2={self.l2}: give one or more strengths above 0")
        if self.max_train is not None and self.max_train < 2:
            raise ConfigError(f"max_train={self.max_train}: must be at least 2")

    @functools.cached_property
    def tables(self) -> tuple[LabelTable, LabelTable]:
        """Labels of the training and the test records; the classes are those of the training records."""
        train = label_table(self.opened("train"), by=self.by, multi_label=self.multi_label)
        test = label_table(
            self.opened("test"), by=self.by, multi_label=self.multi_label, classes=train.classes
        )
        if self.max_train is not None and len(train.indices) > self.max_train:
            order = np.random.default_rng(self.seed).permutation(len(train.indices))[: self.max_train]
            order = np.sort(order)
            train = dataclasses.replace(
                train, indices=train.indices[order], labels=train.labels[order], valid=train.valid[order]
            )
        return train, test

    def check_records(self) -> None:
        train, test = self.tables
        require_outcomes(train, self.opened("train"), self.by)
        require_outcomes(test, self.opened("test"), self.by)
        self._split(self._groups("train", train.indices))

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        self.check_records()
        train, test = self.tables
        features, targets, valid, groups, unreadable, kept = {}, {}, {}, {}, {}, {}
        for part, table in (("train", train), ("test", test)):
            features[part], kept[part], unreadable[part] = encode_records(
                components,
                self.opened(part),
                table.indices,
                need="pooled",
                batch_size=batch_size,
                cache=cache,
            )
            rows = np.isin(table.indices, kept[part])
            targets[part], valid[part] = table.labels[rows], table.valid[rows]
            groups[part] = self._groups(part, kept[part])
        mean, std = features["train"].mean(0, dtype=np.float64), features["train"].std(0, dtype=np.float64)
        x, x_test = ((features[part] - mean) / np.maximum(std, 1e-6) for part in ("train", "test"))
        held_out = self._split(groups["train"])
        fit = functools.partial(fit_logistic, multi_label=self.multi_label)
        y, known = targets["train"], valid["train"]
        losses = {}
        for l2 in self.l2:
            weights = fit(x[~held_out], y[~held_out], known[~held_out], l2=l2)
            losses[l2] = log_loss(
                x[held_out], y[held_out], known[held_out], weights, multi_label=self.multi_label
            )
        best = min(losses, key=lambda l2: (losses[l2], -l2))
        logits = _logits(x_test, fit(x, y, known, l2=best))

        record_set = self.opened("test")
        scores = logits if self.multi_label else scipy.special.softmax(logits, axis=1)
        found, per_example = judge(
            record_set, test, kept["test"], scores, by=self.by, multi_label=self.multi_label
        )
        found.metrics["num_train_images"] = len(x)
        train_set = self.opened("train")
        return EvalResult(
            found.metrics,
            provenance(
                components,
                record_set,
                kept["test"],
                left_out=test.left_out,
                unreadable=unreadable["test"],
                undefined=found.undefined,
                by=self.by,
                multi_label=self.multi_label,
                classes=list(test.classes),
                l2=best,
                l2_on_the_border=len(self.l2) > 1 and best in (min(self.l2), max(self.l2)),
                held_out_log_loss={str(l2): loss for l2, loss in losses.items()},
                train={
                    "source": train_set.name,
                    "split": train_set.config.split,
                    "split_hash": train_set.split_hash(),
                    "num_images": len(x),
                    "unreadable": unreadable["train"],
                    # Above 0 the test numbers are too good: the same patients are on both sides.
                    "num_groups_also_in_test": len(set(groups["train"]) & set(groups["test"])),
                },
            ),
            per_example,
        )

    def _groups(self, part: str, indices: np.ndarray) -> list[str]:
        groups = self.opened(part).groups()
        return [groups[int(i)] for i in indices]

    def _split(self, groups: list[str]) -> Bool[np.ndarray, " n"]:
        """Which training rows are held out to choose the strength: whole groups, about a fifth of them."""
        names = sorted(set(groups))
        if len(names) < 2:
            raise DataError(
                f"{describe(self.opened('train'))}: all images belong to one group ({names[0]!r}); choosing l2 needs two"
            )
        order = np.random.default_rng(self.seed).permutation(len(names))
        held_out = {names[i] for i in order[: max(1, round(HELD_OUT * len(names)))]}
        return np.array([group in held_out for group in groups])


def fit_logistic(
    x: Float[np.ndarray, "n d"],
    labels: Bool[np.ndarray, "n c"],
    valid: Bool[np.ndarray, "n c"],
    *,
    l2: float,
    multi_label: bool,
) -> Float[np.ndarray, "d+1 c"]:
    """Weights and, in the last row, biases that minimise log_loss + l2/2 |weights|^2, by L-BFGS from zero.

    multi_label: a logistic regression for each class, else one softmax over the classes.
    """
    d, c = x.shape[1], labels.shape[1]
    share = _share(valid, multi_label)
    targets = labels.astype(np.float64)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(d + 1, c)
        logits = _logits(x, weights)
        loss = _log_loss(logits, targets, share, multi_label) + 0.5 * l2 * np.sum(weights[:d] ** 2)
        predicted = scipy.special.expit(logits) if multi_label else scipy.special.softmax(logits, axis=1)
        residual = (predicted - targets) * share
        gradient = np.concatenate([x.T @ residual + l2 * weights[:d], residual.sum(0, keepdims=True)])
        return loss, gradient.ravel()

    found = scipy.optimize.minimize(
        objective, np.zeros((d + 1) * c), jac=True, method="L-BFGS-B", options={"maxiter": MAX_ITERATIONS}
    )
    return found.x.reshape(d + 1, c)


def log_loss(
    x: Float[np.ndarray, "n d"],
    labels: Bool[np.ndarray, "n c"],
    valid: Bool[np.ndarray, "n c"],
    weights: Float[np.ndarray, "d+1 c"],
    *,
    multi_label: bool,
) -> float:
    """Mean negative log-likelihood in nats: of a row (single label) or of a known entry (multi-label)."""
    return _log_loss(_logits(x, weights), labels.astype(np.float64), _share(valid, multi_label), multi_label)


def _logits(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return x @ weights[:-1] + weights[-1]


def _share(valid: np.ndarray, multi_label: bool) -> np.ndarray:
    """What each entry counts in the mean."""
    return valid / max(valid.sum(), 1) if multi_label else np.full(valid.shape, 1.0 / len(valid))


def _log_loss(logits: np.ndarray, targets: np.ndarray, share: np.ndarray, multi_label: bool) -> float:
    if multi_label:
        # log(1 + exp(-z)) for positives, log(1 + exp(z)) for negatives.
        return float(np.sum(share * np.logaddexp(0.0, np.where(targets > 0, -logits, logits))))
    return float(-np.sum(share * targets * scipy.special.log_softmax(logits, axis=1)))
