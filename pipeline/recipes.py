"""Named recipes: functions that return every setting of a run, chosen on the command line by `--config NAME`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from cache.config import CacheConfig
from models.config import HeadsConfig, MaskConfig, ModelConfig, TargetConfig
from pipeline.config import ConfigError, PipelineConfig
from stages.config import DataConfig, EvalConfig, FinetuneConfig, ScheduleConfig, TrainConfig


def sample() -> PipelineConfig:
    """The 2,000 images that ship with the repository, 196 tokens an image, nine of twelve blocks frozen in three steps.

    Shows the whole pipeline, not a good encoder: seven epochs are far too few for one.
    Expected: all stages, both baseline arms and the evaluation in about 7 minutes on two CPU cores.
    Command: make all
    """
    return PipelineConfig(
        data=DataConfig(source="sample"),
        model=ModelConfig(name="vit_tiny", image_size=56, patch_size=4),
        mask=MaskConfig(ratio=0.75, groups=4),
        target=TargetConfig(kind="pixels"),
        schedule=ScheduleConfig(cuts=(0, 3, 6, 9), epochs=(2, 1, 1, 3)),
        cache=CacheConfig(views=1),
        train=TrainConfig(batch_size=64),
        eval=EvalConfig(train_limit=500, val_limit=400),
        finetune=FinetuneConfig(epochs=3, warmup_epochs=0.5),
    )


def cifar10() -> PipelineConfig:
    """CIFAR-10, fetched by torchvision, frozen late: half of the epochs train all blocks.

    Expected, from the sample's rates and not measured: half a day on two CPU cores, 9 GB of disk a cut.
    Needs a network once.
    Command: make all CONFIG=cifar10
    """
    base = sample()
    return replace(
        base,
        data=DataConfig(source="cifar10"),
        schedule=ScheduleConfig(cuts=(0, 3, 6, 9), epochs=(20, 8, 6, 6)),
        cache=CacheConfig(views=2, shard_rows=512),
        train=replace(base.train, batch_size=256, warmup_epochs=2.0),
        eval=EvalConfig(train_limit=10_000),
        finetune=FinetuneConfig(epochs=20, batch_size=256, warmup_epochs=2.0),
    )


def vit_b16() -> PipelineConfig:
    """ViT-B/16 at 224 px, whose caches are exactly (N, 196, 768); shortened to 64 images and two steps a stage.

    Expected: about 6 minutes on two CPU cores; shows sizes and costs at full width, learns nothing.
    Command: make all CONFIG=vit_b16
    For real: DATA=... SET="data.limit=0 train.max_steps=0 train.batch_size=256 schedule.epochs=[...]
        cache.shard_rows=256 eval.train_limit=0 eval.val_limit=0
        finetune.max_steps=0 finetune.epochs=100 finetune.batch_size=1024 finetune.freeze=0"
    """
    return PipelineConfig(
        data=DataConfig(source="sample", limit=64),
        model=ModelConfig(name="vit_base", image_size=224, patch_size=16),
        schedule=ScheduleConfig(cuts=(0, 3, 6, 9), epochs=(2, 2, 2, 2)),
        cache=CacheConfig(views=1, shard_rows=16),
        train=TrainConfig(batch_size=16, max_steps=2),
        eval=EvalConfig(train_limit=40, val_limit=40, batch_size=20),
        finetune=FinetuneConfig(epochs=1, batch_size=16, max_steps=2, freeze=9, views=1),
    )


def localmim() -> PipelineConfig:
    """LocalMIM on the sample: HOG at four depths and four scales, which frozen blocks take away one after the other.

    The images are shown at 112 pixels, so that the finest cells are 2 x 2 pixels as there are 196 tokens.
    Expected: 15 to 20 minutes on two CPU cores.
    Command: make all CONFIG=localmim
    """
    base = sample()
    return replace(
        base,
        model=replace(base.model, image_size=112, patch_size=8),
        target=TargetConfig(kind="hog"),
        heads=HeadsConfig(blocks=(2, 4, 10, 12), scales=(4.0, 2.0, 1.0, 0.5)),
    )


def original() -> PipelineConfig:
    """The idea as it was first written down: frozen blocks see all tokens, and the decoder predicts their features.

    It leaks: visible features have attended to the tokens that are hidden afterwards, so the task is easier than MAE's
    and its loss cannot be compared with another mode's. Kept to be measured, not recommended.
    Expected: about 8 minutes on two CPU cores.
    Command: make all CONFIG=original
    """
    base = sample()
    return replace(base, mask=replace(base.mask, groups=1), target=TargetConfig(kind="features"))


def adapt() -> PipelineConfig:
    """A pre-trained ViT-B/16 adapted to your own images: its first six blocks stay, the others learn from the cache.

    Stage 0 trains for no epoch: it is the checkpoint as it is, with its class token and its own positions. The file
    must be given; a ViT of another size goes with model.name, one without class token with model.class_token=false.
    Images are normalised as MAE's and DINO's weights want them; timm's augreg ones and SigLIP want
    SET="model.mean=[0.5,0.5,0.5] model.std=[0.5,0.5,0.5]". Stage 0 tells what is assumed.
    Whether the adapted encoder is better than the checkpoint depends on how far your images are from those that it was
    trained on: compare stage 0's scores, which are the checkpoint's own, with stage 1's.
    Expected, as `plan` predicts it for 2,000 images on two CPU cores: 5 minutes of cache and 7 of training; 1.8 MB of
    disk an image. It was run on small models only and not measured on a real pre-trained one; `make plan` with the same
    words prices it on your machine.
    Command: make stage-1 CONFIG=adapt DATA=path/to/images SET="model.weights=vit_base.safetensors"
    Then: the same with `finetune` or `export` for `stage-1`; `all` adds the arms that the cache is compared with.
    """
    return PipelineConfig(
        data=DataConfig(source="sample"),
        model=ModelConfig(name="vit_base", image_size=224, patch_size=16, class_token=True),
        schedule=ScheduleConfig(cuts=(0, 6), epochs=(0, 8)),
        cache=CacheConfig(views=4),
        train=TrainConfig(batch_size=64, lr=1e-4, warmup_epochs=1.0),
        eval=EvalConfig(every=2),
        finetune=FinetuneConfig(freeze=6, views=4),
    )


RECIPES: dict[str, Callable[[], PipelineConfig]] = {
    "sample": sample,
    "cifar10": cifar10,
    "vit_b16": vit_b16,
    "localmim": localmim,
    "original": original,
    "adapt": adapt,
}


def recipe(name: str) -> PipelineConfig:
    """The settings of a named recipe. Raises ConfigError naming the nearest one."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(RECIPES)} or give a .toml file"
        raise ConfigError(f"no recipe {name}; {hint}")
    return RECIPES[name]()
