"""Every probe of an encoder on features computed once: the old ones with their old numbers, the new ones with the
setting that won, and refusals."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest

from models.config import ModelConfig
from models.vit import Encoder, build_encoder
from stages import scores
from stages.config import EvalConfig
from stages.errors import DataError
from stages.images import Data, ImageList, open_images
from stages.probe import encoded, evaluate
from stages.scores import score

SIZE = 16
ALL = EvalConfig(
    knn_k=5,
    batch_size=7,
    probes=("knn", "logistic", "sgd", "lars", "attentive"),
    probe_epochs=40,
    attentive_epochs=15,
    lars_rates=(30.0, 100.0),
    probe_batch=40,
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(ModelConfig(image_size=SIZE, patch_size=8, width=8, depth=2, heads=2), seed=0)


@pytest.fixture(scope="module")
def data(colours: ImageList) -> Data:
    return Data(colours.only(range(40)), colours.only(range(40, 60)))


def test_all_probes_on_one_pass_over_the_images(
    encoder: Encoder, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def counted(encoder, images, *rest):  # type: ignore[no-untyped-def]
        passes.append(len(images))
        return encoded(encoder, images, *rest)

    monkeypatch.setattr(scores, "encoded", counted)
    found = score(encoder, data, ALL, SIZE, "cpu", "float32", seed=0)
    assert sorted(passes) == [20, 40] and (found.images, found.train_images) == (20, 40)
    assert [one.probe for one in found.scores] == list(ALL.probes)
    assert all(one.top1 == 1.0 for one in found.scores), f"red and blue are told apart by any probe: {found.scores}"
    knn, logistic, sgd, lars, attentive = found.scores
    assert knn.setting == {"k": 5} and logistic.setting == {"C": 1.0} and knn.held_back == {}
    for one, rates in ((sgd, ALL.probe_rates), (lars, ALL.lars_rates), (attentive, ALL.attentive_rates)):
        assert one.setting["rate"] in rates and list(one.held_back) == [f"{rate:g}" for rate in rates]
    plain = found.to_dict()
    assert plain["probes"]["knn"] == {"top1": 1.0, "setting": {"k": 5}}
    assert plain["probes"]["sgd"]["held_back_top1"] == sgd.held_back


def test_knn_logistic_and_monitors_are_those_of_training(encoder: Encoder) -> None:
    val = open_images("sample:val")
    data = Data(open_images("sample"), val)
    config = EvalConfig(train_limit=150, val_limit=80)
    want = evaluate(encoder, data, config, SIZE, "cpu", "float32")
    found = score(encoder, data, config, SIZE, "cpu", "float32", seed=0)
    assert [one.top1 for one in found.scores] == [want.knn_top1, want.linear_top1]
    assert (found.feature_std, found.effective_rank) == (want.feature_std, want.effective_rank)
    assert (found.images, found.train_images) == (80, 150)
    assert 0.05 < want.linear_top1 < 0.6


def test_without_labels_there_are_monitors_only(encoder: Encoder, colours: ImageList) -> None:
    bare = replace(colours, entries=tuple(replace(entry, label=-1) for entry in colours.entries[:9]))
    found = score(encoder, Data(bare, bare), ALL, SIZE, "cpu", "float32", seed=0)
    assert (found.scores, found.images) == ((), 9) and found.effective_rank > 1


def test_too_few_images_and_too_little_memory_are_refused_in_one_line(
    encoder: Encoder, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Data(data.train.only([0, 1]), data.val)
    with pytest.raises(DataError, match=r"2 labelled training images are too few .* needs 3"):
        score(encoder, few, ALL, SIZE, "cpu", "float32", seed=0)
    assert score(encoder, few, EvalConfig(), SIZE, "cpu", "float32", seed=0).train_images == 2
    monkeypatch.setattr(scores, "free_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"eval.probes=attentive keeps .* GB .* lower eval.train_limit"):
        score(encoder, data, ALL, SIZE, "cpu", "float32", seed=0)
    without = replace(ALL, probes=("knn", "sgd"))
    assert len(score(encoder, data, without, SIZE, "cpu", "float32", seed=0).scores) == 2


def test_a_containers_limit_bounds_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores.free_memory()  # imports what it needs
    own, room = psutil.Process().memory_info().rss, 50_000_000
    monkeypatch.setattr("distributed.system.memory_limit", lambda: own + room)
    assert abs(scores.free_memory() - room) < 40_000_000  # what the process takes moves by little between two looks
    monkeypatch.setattr("distributed.system.memory_limit", lambda: 10**15)
    monkeypatch.setattr(scores.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert scores.free_memory() == 1000
