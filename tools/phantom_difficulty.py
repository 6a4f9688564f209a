"""How hard the phantoms are: 1-NN and ridge on 8x8 pixels, and a supervised network as the ceiling.

    python tools/phantom_difficulty.py --train 6000 --test 1500 --epochs 14

prints a markdown table of AUROC by finding, each within its own modality, with train and test apart by
patient. Ridge takes the best of several penalties *on the test images*, so its column is an upper bound.
The 8x8 pixels are block means in RGB, standardised. The network is a small convolutional one, trained on
the labels of all modalities at once; `--no-network` leaves it out. About 5 minutes on two cores.
"""

import argparse
import time

import numpy as np

from bvl.data.phantoms import FINDINGS, MODALITIES, Phantoms, PhantomSource

NAMES = [name for modality in MODALITIES for name in FINDINGS[modality]]
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def load(source: PhantomSource, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [n, h, w, 3], labels [n, findings], modality numbers [n]."""
    images, labels, modalities = [], [], []
    for index in indices:
        record = source[index]
        images.append(record["image"])
        labels.append([name in record["labels"] for name in NAMES])
        modalities.append(MODALITIES.index(record["modality"]))
    return np.stack(images), np.array(labels, np.float32), np.array(modalities)


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = labels.sum()
    negatives = len(labels) - positives
    return float((ranks[labels > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def block_means(images: np.ndarray) -> np.ndarray:
    """8x8 block means in RGB, flattened."""
    n, size = images.shape[:2]
    step = size // 8
    blocks = images.reshape(n, 8, step, 8, step, 3).astype(np.float32).mean((2, 4))
    return blocks.reshape(n, -1)


def nearest_neighbour(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """The labels of the nearest training example."""
    distance = (x * x).sum(1)[None] - 2.0 * x_test @ x.T
    return y[distance.argmin(1)]


def ridge(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, penalty: float) -> np.ndarray:
    """Scores of ridge regression with an intercept."""
    mean = y.mean(0)
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - mean))
    return x_test @ weights + mean


def simple_scores(train, test) -> dict[str, tuple[float, float]]:
    """AUROC of 1-NN and ridge by finding, each fitted on its own modality."""
    result = {}
    for number, modality in enumerate(MODALITIES):
        x, x_test = (block_means(images[m == number]) for images, _, m in (train, test))
        columns = [NAMES.index(name) for name in FINDINGS[modality]]
        y, y_test = (labels[m == number][:, columns] for _, labels, m in (train, test))
        mean, spread = x.mean(0), x.std(0) + 1e-6
        x, x_test = (x - mean) / spread, (x_test - mean) / spread
        near = nearest_neighbour(x, y, x_test)
        fits = [ridge(x, y, x_test, penalty) for penalty in PENALTIES]
        for k, name in enumerate(FINDINGS[modality]):
            best = max(auroc(fit[:, k], y_test[:, k]) for fit in fits)
            result[name] = (auroc(near[:, k], y_test[:, k]), best)
    return result


def modality_accuracy(train, test) -> float:
    """Accuracy of 1-NN on 8x8 pixels at telling the modality."""
    near = nearest_neighbour(block_means(train[0]), train[2], block_means(test[0]))
    return float((near == test[2]).mean())


def network_scores(train, test, *, epochs: int, batch_size: int = 64) -> np.ndarray:
    """Test logits [n, findings] of a convolutional network trained on the labels."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width, stride in ((32, 2), (64, 2), (96, 1), (128, 2)):
                x = nn.Conv(width, (5, 5) if width == 32 else (3, 3), (stride, stride))(x)
                x = nn.relu(nn.GroupNorm(8)(x))
            x = jnp.concatenate([x.max((1, 2)), x.mean((1, 2))], -1)
            return nn.Dense(len(NAMES))(nn.relu(nn.Dense(128)(x)))

    owner = np.array([number for number, modality in enumerate(MODALITIES) for _ in FINDINGS[modality]])
    images, labels, modalities = train
    relevant = (modalities[:, None] == owner).astype(np.float32)
    network = Network()
    steps = epochs * (len(images) // batch_size)
    optimiser = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 20, steps), weight_decay=1e-3
    )

    def normalise(batch):
        x = batch.astype(jnp.float32) / 127.5 - 1.0
        mean, spread = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
        return (x - mean) / (spread + 1e-3)

    @jax.jit
    def step(params, state, batch, y, weight):
        def objective(params):
            losses = optax.sigmoid_binary_cross_entropy(network.apply(params, normalise(batch)), y)
            return (losses * weight).sum() / weight.sum()

        gradients = jax.grad(objective)(params)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = network.init(jax.random.key(0), jnp.zeros((1, *images.shape[1:])))
    state = optimiser.init(params)
    order = np.random.default_rng(0)
    for _ in range(epochs):
        shuffled = order.permutation(len(images))
        for start in range(0, len(images) - batch_size + 1, batch_size):
            rows = shuffled[start : start + batch_size]
            params, state = step(params, state, images[rows], labels[rows], relevant[rows])
    predict = jax.jit(lambda batch: network.apply(params, normalise(batch)))
    return np.concatenate([predict(test[0][k : k + 250]) for k in range(0, len(test[0]), 250)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=6000, help="training images of all modalities together")
    parser.add_argument("--test", type=int, default=1500, help="test images of other patients")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-network", action="store_true", help="leave the supervised network out")
    options = parser.parse_args()

    total = options.train + options.test
    share = options.test / total
    config = Phantoms(num_patients=total, seed=options.seed, val_fraction=0.0, test_fraction=share)
    source = PhantomSource(config)
    started = time.perf_counter()
    train = load(source, source.indices("train")[: options.train])
    test = load(source, source.indices("test")[: options.test])
    speed = (len(train[0]) + len(test[0])) / (time.perf_counter() - started)

    simple = simple_scores(train, test)
    network = None
    if not options.no_network:
        started = time.perf_counter()
        network = network_scores(train, test, epochs=options.epochs)
        seconds = time.perf_counter() - started
    print("| modality | finding | prevalence | 1-NN 8x8 | ridge 8x8 | supervised network |")
    print("|---|---|---|---|---|---|")
    for number, modality in enumerate(MODALITIES):
        rows = test[2] == number
        columns = []
        for name in FINDINGS[modality]:
            k = NAMES.index(name)
            y = test[1][rows, k]
            ceiling = auroc(network[rows, k], y) if network is not None else float("nan")
            columns.append((float(y.mean()), *simple[name], ceiling))
            print(f"| {modality} | {name} | " + " | ".join(f"{value:.3f}" for value in columns[-1]) + " |")
        print(f"| {modality} | **macro** | " + " | ".join(f"{v:.3f}" for v in np.mean(columns, 0)) + " |")
    print()
    print(
        f"1-NN on 8x8 pixels tells the modality in {modality_accuracy(train, test):.1%} of the test images."
    )
    print(f"{len(train[0])} training and {len(test[0])} test images at {speed:.0f} images/s.")
    if network is not None:
        print(f"The network trained {options.epochs} epochs in {seconds:.0f} s.")


if __name__ == "__main__":
    main()
