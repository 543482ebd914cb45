"""The nearest-neighbour probe against nested loops in float64, its ties, and how its k is chosen."""

import math

import pytest
import torch
from torch import Tensor

from dist_contrastive.evaluation.knn import BY_K, automatic_k, knn_predict

CLASSES = 4


def problem(num_train: int = 120, num_test: int = 60, size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping classes in features of any length: bank float32 [N, D], its classes [N], queries [M, D]."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, size, generator=generator)
    train_y = torch.randint(CLASSES, (num_train,), generator=generator)
    test_y = torch.randint(CLASSES, (num_test,), generator=generator)
    train_x, test_x = (
        centers[y] + 1.2 * torch.randn(len(y), size, generator=generator) + 0.5 for y in (train_y, test_y)
    )
    return train_x * (0.1 + 5 * torch.rand(num_train, 1, generator=generator)), train_y, test_x


def predict(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, num_classes: int, k: int, temperature: float
) -> Tensor:
    """The classes for one k."""
    return knn_predict(train_x, train_y, test_x, num_classes=num_classes, ks=[k], temperature=temperature)[k]


def votes_of_loops(bank: list[list[float]], labels: list[int], query: list[float], k: int, t: float) -> list[float]:
    """The logarithm of each class's votes, sample by sample."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    similarity = [cosine(query, row) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
    votes = []
    for label in range(CLASSES):
        own = [similarity[i] / t for i in nearest if labels[i] == label]
        votes.append(max(own) + math.log(sum(math.exp(s - max(own)) for s in own)) if own else -math.inf)
    return votes


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e-4, 5e-4, 0.002, 0.005, 0.02, 0.1, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("k", [1, 3, 20, 500])
def test_votes_are_those_of_nested_loops(k: int, temperature: float) -> None:
    train_x, train_y, test_x = problem()
    # One query lies opposite to all others: its nearest neighbours are far away.
    test_x[0] = -train_x.mean(0)
    found = predict(train_x, train_y, test_x, num_classes=CLASSES, k=k, temperature=temperature).tolist()
    margin = 1e-6 / temperature + 1e-6  # what float32 does not know of a cosine
    num_same = 0
    for query, label in zip(test_x.double().tolist(), found, strict=True):
        votes = votes_of_loops(train_x.double().tolist(), train_y.tolist(), query, k, temperature)
        assert votes[label] >= max(votes) - margin
        num_same += votes[label] == max(votes)
    if 1e-4 <= temperature <= 1.0:
        assert num_same >= 0.98 * len(found)


def test_a_low_temperature_asks_the_nearest_alone() -> None:
    train_x, train_y, test_x = problem()
    nearest = predict(train_x, train_y, test_x, num_classes=CLASSES, k=1, temperature=0.1)
    assert len(nearest.unique()) == CLASSES
    for temperature in (1e-8, 1e-40, 1e-300):
        found = predict(train_x, train_y, test_x, num_classes=CLASSES, k=100, temperature=temperature)
        assert torch.equal(found, nearest)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-13, 1.0, 1e13, 1e25, 1e37])
def test_the_length_of_features_does_not_matter(scale: float) -> None:
    train_x, train_y, test_x = problem()
    expected = predict(train_x, train_y, test_x, num_classes=CLASSES, k=5, temperature=0.1)
    lengths = torch.ones(len(test_x), 1)
    lengths[::2] = scale
    found = predict(train_x, train_y, test_x * lengths, num_classes=CLASSES, k=5, temperature=0.1)
    # Features as short as 1e-42 are denormal numbers of three digits.
    assert (found == expected).double().mean() >= (0.9 if scale < 1e-38 else 1.0)
    zeros = predict(train_x, train_y, torch.zeros(3, 6), num_classes=CLASSES, k=5, temperature=0.1)
    assert torch.equal(zeros, zeros[:1].expand(3))


def test_of_equal_votes_the_lowest_class_wins() -> None:
    axes = torch.eye(3)
    query = torch.tensor([[1.0, 1.0, 1.0]])
    for labels in ([2, 1, 3], [3, 2, 1], [1, 3, 2]):
        for temperature in (1e-4, 0.1, 10.0):
            found = predict(axes, torch.tensor(labels), query, num_classes=4, k=3, temperature=temperature)
            assert found.tolist() == [1]


@pytest.mark.parametrize("num_train", [12, 50, 500, 3000])
def test_of_equally_near_samples_the_first_are_neighbours(num_train: int) -> None:
    x = torch.zeros(num_train, 2)
    x[::2, 0] = 1.0  # every second sample is as near as can be
    x[1::2, 1] = 1.0
    ks = [k for k in (1, 2, 5, 20, 100) if 4 * k <= num_train]
    for last in ks:
        labels = torch.full((num_train,), 2)
        labels[: 2 * last : 2] = 1
        found = knn_predict(x, labels, x[:1], num_classes=3, ks=ks, temperature=0.1)
        assert {k: found[k].item() for k in ks if k <= last} == {k: 1 for k in ks if k <= last}
        assert predict(x, labels, x[:1], num_classes=3, k=last, temperature=0.1).tolist() == [1]


def test_many_ks_in_one_pass_are_those_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    train_x, train_y, test_x = problem()
    monkeypatch.setattr("dist_contrastive.evaluation.knn.CHUNK_VALUES", 7 * len(train_x))  # several chunks
    by_k = knn_predict(train_x, train_y, test_x, num_classes=CLASSES, ks={*BY_K, 33}, temperature=0.1)
    assert by_k.keys() == {*BY_K, 33}
    for k, found in by_k.items():
        assert torch.equal(found, predict(train_x, train_y, test_x, num_classes=CLASSES, k=k, temperature=0.1))


@pytest.mark.parametrize(
    ("sizes", "k"),
    [
        ([5000] * 10, 200),  # CIFAR-10
        ([1300] * 5 + [732], 200),  # ImageNet
        ([500] * 20, 83),  # CIFAR-100
        ([68] * 12, 11),
        ([68] * 11 + [1], 11),  # one class of a single sample has no say
        ([0, 68, 68], 11),  # a class without training samples is none
        ([5] * 3, 1),
        ([1] * 3, 1),
    ],
)
def test_the_automatic_k_follows_the_size_of_the_classes(sizes: list[int], k: int) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    assert automatic_k(labels) == k
