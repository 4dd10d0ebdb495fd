"""The classifier: logits against timm's own forward pass, heads behind several blocks, what learns behind a cut, and
weights under timm's names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from models.classifier import Classifier, LabelledBatch, build_classifier
from models.config import ModelConfig
from models.spec import digest
from models.vit import ModelError, build_encoder

Small = Callable[..., ModelConfig]


def classifier(config: ModelConfig, blocks: tuple[int, ...] = (), cut: int = 0, pool: str = "mean") -> Classifier:
    encoder = build_encoder(config, seed=0)
    model = build_classifier(encoder, 5, blocks, cut, pool, seed=0)
    for head in model.in_order:  # the heads' first weights are all but 0
        nn.init.normal_(head.linear.weight)
    return model.eval()


def batch_of(tokens_BLD: Tensor) -> LabelledBatch:
    return LabelledBatch(tokens_BLD, torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0.2, 0.8], [1.0, 0, 0, 0, 0]]))


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_logits_are_those_of_timm_with_the_same_weights(small: Small, images: Tensor, pool: str) -> None:
    """mean: average of the patch tokens, then norm; token: norm of the class token."""
    token = pool == "token"
    config = small(name="vit_tiny", class_token=True) if token else small()
    model = classifier(config, pool=pool)
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=4,
        num_heads=3,
        num_classes=5,
        class_token=token,
        global_pool="token" if token else "avg",
    ).eval()
    state = model.timm_state()
    assert set(state) == set(theirs.state_dict()), "a checkpoint that timm loads as it stands"
    theirs.load_state_dict(state)
    (logits,) = model.logits(model.at_cut(images.float() / 255))
    torch.testing.assert_close(logits, theirs(images.float() / 255), rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_cross_entropy_with_shares_of_classes(small: Small, images: Tensor) -> None:
    model = classifier(small())
    batch = batch_of(model.at_cut(images.float() / 255))
    (logits,) = model.logits(batch.tokens_BLD)
    want = -(batch.shares_BK * log_softmax(logits, dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(model(batch), want.reshape(1))


def test_a_head_reads_the_blocks_before_it_and_leaves_the_others_heads_alone(small: Small, images: Tensor) -> None:
    several, single = classifier(small(), blocks=(1, 3)), classifier(small())
    assert several.loss_names == ("block1", "block3", "block4")
    single.heads[-1].load_state_dict(several.heads[-1].state_dict())
    with torch.no_grad():
        tokens = several.at_cut(images.float() / 255)
        *_, last = several.logits(tokens)
        (alone,) = single.logits(tokens)
        torch.testing.assert_close(last, alone)
        first = next(several.logits(tokens))
        torch.testing.assert_close(first, several.in_order[0](several.encoder.run(tokens, 0, 1).mean(dim=1)))
    assert several(batch_of(tokens)).shape == (3,) and several.loss_weights(0.5) == (1.0, 1.0, 1.0)
    assert {"heads.1.norm.weight", "heads.3.linear.bias", "head.weight", "fc_norm.bias"} < set(several.timm_state())


@pytest.mark.parametrize("cut", [0, 2, 4])
def test_only_what_stands_behind_the_cut_has_a_gradient(small: Small, images: Tensor, cut: int) -> None:
    model = classifier(small(), blocks=(4,), cut=cut).train()
    model(batch_of(model.at_cut(images.float() / 255))).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    frozen = ("encoder.vit.patch_embed.", *(f"encoder.vit.blocks.{block}." for block in range(cut)))
    everything = {name for name, _ in model.named_parameters()}
    never = {"encoder.vit.pos_embed", "encoder.vit.norm.weight", "encoder.vit.norm.bias"}
    assert with_gradient == {name for name in everything if not (cut and name.startswith(frozen))} - never
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}


def test_weights_are_a_pure_function_of_the_seed_and_further_heads_change_none(small: Small) -> None:
    def weights(seed: int, blocks: tuple[int, ...]) -> dict[str, str]:
        model = build_classifier(build_encoder(small(), seed=0), 3, blocks, 0, "mean", seed)
        return {name: digest(value.tolist()) for name, value in model.timm_state().items() if "head." in name}

    assert weights(0, ()) == weights(0, (2,)) != weights(1, ())
    first = build_classifier(build_encoder(small(), seed=0), 3, (), 0, "mean", 0).in_order[-1].linear.weight
    assert 0 < float(first.detach().abs().max()) < 1e-4, "logits start at 0, as MAE's"


def test_the_class_tokens_head_goes_on_with_the_encoders_norm(small: Small) -> None:
    encoder = build_encoder(small(class_token=True), seed=0)
    nn.init.normal_(encoder.vit.norm.weight)
    model = build_classifier(encoder, 3, (2,), 0, "token", 0)
    assert torch.equal(model.in_order[-1].norm.weight, encoder.vit.norm.weight)
    assert bool((model.in_order[0].norm.weight == 1).all()) and bool((model.in_order[0].norm.bias == 0).all())
    assert encoder.vit.norm is not model.in_order[-1].norm and not encoder.vit.norm.weight.requires_grad
    assert model.in_order[-1].norm.weight.requires_grad


def test_heads_have_the_norm_of_their_model(small: Small, images: Tensor) -> None:
    """AIMv2's is an RMS norm; its blocks are timm's."""
    encoder = build_encoder(small(name="aimv2_large_patch14_224"), seed=0)
    model = build_classifier(encoder, 3, (2,), 0, "mean", 0)
    assert {type(head.norm) for head in model.in_order} == {type(encoder.vit.norm)} != {nn.LayerNorm}
    (first, last) = model.logits(model.at_cut(images.float() / 255))
    assert first.shape == last.shape == (3, 3)


@pytest.mark.parametrize(
    ("blocks", "cut", "pool", "message"),
    [
        ((), 0, "token", "finetune.pool=token needs a class token"),
        ((5,), 0, "mean", r"finetune.heads=\[5\] must lie in 1..4"),
        ((1,), 2, "mean", r"finetune.heads=\[1\] must lie in 2..4, between finetune.freeze=2"),
    ],
)
def test_what_does_not_go_together_is_refused(
    small: Small, blocks: tuple[int, ...], cut: int, pool: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_classifier(build_encoder(small(), seed=0), 3, blocks, cut, pool, 0)
