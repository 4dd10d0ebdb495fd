"""Settings of data, schedule, training and evaluation. Free of torch, like every config module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how views are cut from them."""

    source: str = "sample"
    """sample, a folder of images, WebDataset tars (path, glob or {000000..000007}), either also at a URL such as
    s3://bucket/train-*.tar, or a torchvision name (cifar10)."""
    val_source: str = ""
    """Images to evaluate on; empty holds out a tenth of the source."""
    limit: int = 0
    """Use only so many training images, evenly spread over the list, classes in proportion; 0 uses all."""
    cache_gb: float = 10.0
    """Of images behind URLs, keep copies of up to so many 10^9 bytes in <run>/index/copies, the least recently used
    goes first; 0 keeps none, and every image is read from its store whenever it is met."""
    on_bad: Literal["stop", "skip"] = "stop"
    """A file that is no readable image stops the run, or is left out and recorded; so does an image of val_source that
    is a training image, too."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a view may show."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest ratio of width to height of a view."""
    flip: float = 0.5
    """Chance that a view is mirrored."""

    @property
    def has_own_val(self) -> bool:
        """Whether the source brings images to evaluate on, so that none of it are held out."""
        return self.source == "sample"


@dataclass(frozen=True)
class ScheduleConfig:
    """When blocks freeze."""

    kind: Literal["explicit", "freezeout", "adaptive"] = "explicit"
    """explicit: cuts and epochs as given; freezeout: epochs from FreezeOut's schedule; adaptive: a stage ends once the
    blocks before the next cut have settled."""
    cuts: tuple[int, ...] = (0, 3, 6, 9)
    """First learning block of each stage; stage 0 has cut 0. With adaptive: the candidates, in order."""
    epochs: tuple[int, ...] = (2, 2, 2, 2)
    """Epochs of each stage; with freezeout and adaptive their sum is the length of the whole run."""
    caches: Literal["given", "cost"] = "given"
    """FreezeOut: which freeze events get a cache: those of schedule.cuts, or those that cost fewest FLOPs; the blocks
    of the others go on running forward without gradient."""
    t0: float = 0.8
    """FreezeOut: share of the run at which the patch embedding freezes, before scaling."""
    scale: Literal["linear", "squared", "cubic"] = "cubic"
    """FreezeOut: how the freezing times of the layers are spaced."""
    scale_lr: bool = True
    """FreezeOut: divide a layer's learning rate by its share of the run, so that each travels as far."""
    layer_rates: Literal["cosine", "shared"] = "cosine"
    """FreezeOut: a cosine for each layer that ends at 0 when it freezes, or train.lr_schedule for all until they
    freeze."""
    freeze_embed: bool = True
    """Whether layer 0 (patch embedding, positions, class token) freezes; without it nothing can be cached."""
    check_every: float = 1.0
    """Adaptive: epochs between two checks of whether the blocks before the next cut have settled."""
    probe_images: int = 64
    """Adaptive: training images, evenly spread, whose features are compared; centre views, all tokens."""
    settle_metric: Literal["change", "cka"] = "change"
    """Adaptive: relative change of the features between two checks, ||a - b|| / ||b||, or 1 - linear CKA."""
    settle_below: float = 0.1
    """Adaptive: the measure below which blocks count as settled. A change of 0.1 is about 0.01 by cka, its square; 640
    images of the sample bring the change of three blocks in an epoch from 1 to 0.3 in 5 and to 0.07 in 9 of 12."""
    settle_checks: int = 2
    """Adaptive: checks in a row that must be below schedule.settle_below."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser and the loop, alike for every stage and arm."""

    batch_size: int = 64
    """Images of one optimiser step."""
    accumulate: int = 1
    """Micro-batches that a step's batch is split into; gradients equal those of the whole batch, but for which samples
    stochastic depth (`drop_path`) drops."""
    max_steps: int = 0
    """Upper bound of a stage's optimiser steps; 0 means none. What is told in epochs counts those that were trained."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine", "wsd", "schedule_free"] = "cosine"
    """Rate after the warm-up, over the steps of the whole plan. wsd: stable, then a linear decay; schedule_free: a
    constant rate and averaged weights (AdamWScheduleFree), which are what is evaluated, cached and exported."""
    min_lr: float = 1e-6
    """Where the cosine, and the decay of wsd, end."""
    decay_share: float = 0.2
    """Share of the steps, at their end, over which wsd decays linearly to train.min_lr."""
    warmup_epochs: float = 0.5
    """Epochs of linear warm-up at the start of stage 0."""
    lr_restart: bool = False
    """Begin warm-up and schedule anew at every stage, over that stage's own steps."""
    early_stop: int = 0
    """End a stage or arm after so many evaluations in a row without a better kNN; 0 never. Needs eval.every."""
    save_epochs: tuple[int, ...] = ()
    """Epochs of the whole run after which the encoder is kept as epoch-<e>.safetensors beside its stage or arm."""
    weight_decay: float = 0.05
    """AdamW's weight decay, not applied to biases, norms and tokens."""
    beta2: float = 0.95
    """AdamW's second moment decay; the first is 0.9."""
    clip: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    drop_path: float = 0.0
    """Stochastic depth of the learning blocks: the last block's rate, from 0 at the first block on rising linearly."""
    layer_drop: float = 0.0
    """Progressive layer dropping: the chance, all but reached after a twentieth of the run, with which the deepest
    block would be skipped for a step; block i of L has i/L of it. The paper's limit of theta is 1 minus this."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast precision of all blocks, frozen or not; auto: bfloat16 where the hardware has it, else float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the step with torch.compile: seconds of start-up, some per cent of every step. auto: for stages of 5,000
    steps or more, where there is a C++ compiler."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp, every rank holds the whole model; fsdp, weights and moments are spread over the ranks, for
    models that do not fit. Saved states are whole in both."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int = 0
    """CPU threads of torch; 0 means one per core."""
    loader_threads: int = 2
    """Threads that prepare the next batches."""
    prefetch: int = 4
    """Batches prepared ahead."""
    save_every: float = 20.0
    """Seconds between two saved states from which an interrupted stage goes on."""


@dataclass(frozen=True)
class EvalConfig:
    """kNN and linear probe on mean-pooled features of held-out images; never counted as training time."""

    every: int = 0
    """Epochs between two evaluations; 0 evaluates at the end of each stage only."""
    train_limit: int = 0
    """Training images that the probes learn from, evenly spread, classes in proportion; 0 uses all."""
    val_limit: int = 0
    """Held-out images that the probes are scored on, chosen likewise; 0 uses all."""
    knn_k: int = 20
    """Neighbours that vote."""
    batch_size: int = 100
    """Images that pass the encoder at once."""
    probes: tuple[Literal["knn", "logistic", "sgd", "lars", "attentive"], ...] = ("knn", "logistic")
    """What `probe` scores an encoder with: knn; logistic regression; sgd and lars, linear probes trained as MAE's;
    attentive, one learned query that attends to all tokens. Training itself records the first two."""
    probe_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates that sgd tries, for 256 images a step; the best on held-back training images is taken."""
    lars_rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)
    """The same for lars, whose steps are a thousandth of a weight's norm; MAE's 0.1 for 16,384 images a step is 6.4."""
    probe_epochs: int = 90
    """Epochs of sgd and lars."""
    attentive_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The same for the attentive probe's AdamW, whatever the images a step."""
    attentive_epochs: int = 20
    """Epochs of the attentive probe."""
    probe_batch: int = 256
    """Images of one step of a probe that is trained."""
    probe_hold_back: float = 0.2
    """Share of the training images on which a probe's rate is chosen; the winner is then trained on all of them."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Supervised fine-tuning, by MAE's and LocalMIM's recipe scaled to short runs."""

    epochs: int = 10
    """Epochs."""
    batch_size: int = 64
    """Images of one optimiser step."""
    accumulate: int = 1
    """Micro-batches that a step's batch is split into, after mixing; gradients equal those of the whole batch, but for
    which images stochastic depth (`drop_path`) drops."""
    max_steps: int = 0
    """Upper bound of the optimiser steps; 0 means none."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, that of the heads; earlier layers learn more slowly."""
    min_lr: float = 1e-6
    """Where the cosine ends."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """AdamW's weight decay, not applied to biases, norms and tokens."""
    beta2: float = 0.999
    """AdamW's second moment decay; the first is 0.9."""
    layer_decay: float = 0.75
    """A layer's rate over that of the layer behind it: block i of L learns at lr * layer_decay^(L + 1 - i)."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    drop_path: float = 0.1
    """Chance that a branch of the last block, attention or MLP, is left out for an image; it grows linearly from 0 at
    the first block."""
    mixup: float = 0.8
    """Alpha of mixup; 0 switches it off."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 switches it off. With mixup as well, each step draws one of the two. Behind frozen blocks
    tokens are swapped on their grid."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""
    rand_augment: float = 9.0
    """Magnitude, of 10, of RandAugment: two operations on a view, each with a chance of a half; 0 switches it off."""
    pool: Literal["mean", "token"] = "mean"
    """What a head reads: the mean of the image's tokens, or the class token where the model has one."""
    freeze: int = 0
    """Blocks from the first on that stay as they are. They run once over `views` views, and training reads their
    output from a cache; 0 trains everything from images, a new view in every epoch."""
    views: int = 2
    """Augmented views that the cache behind frozen blocks keeps; epoch e reads view e mod views."""
    heads: tuple[int, ...] = ()
    """After how many blocks a further linear head reads the encoder, for instance [6,9,12]; the last block always has
    one. All are trained together, and each is scored."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, the first of a batch with its last, the second with the last but one."""
        return self.mixup > 0 or self.cutmix > 0
