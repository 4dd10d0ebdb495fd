"""The studies: what is compared with what, on which data, over which seeds, as functions that return a frozen value.
`permafrost study NAME` runs one. A new study is such a function and its name in STUDIES."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config import ConfigError

Settings = Mapping[str, Any]
Measured = Literal["cached", "e2e", "freeze", "finetune"]


@dataclass(frozen=True)
class Variant:
    """One row of a study: a run's settings, and which part of that run is measured."""

    settings: Settings = field(default_factory=dict)
    """By dotted name, over those of the study. Variants of equal settings are one run."""
    arm: Measured = "cached"
    """cached: all stages; e2e, freeze: the baseline arm; finetune: supervised fine-tuning from the last stage."""
    against: str = ""
    """The variant that it is compared with; empty: the study's control."""


@dataclass(frozen=True)
class Study:
    """A question, and the runs that are to answer it."""

    question: str
    variants: Mapping[str, Variant]
    control: str
    """The variant that the others are compared with, seed by seed."""
    settings: Settings = field(default_factory=dict)
    """What all variants have in common, over the recipe."""
    recipe: str = "sample"
    seeds: tuple[int, ...] = (0, 1, 2)
    chooses: bool = False
    """Whether its numbers choose settings: it is then refused evaluation images (DATA_VAL, data.val_source, the
    sample's), and scores on a tenth of the training images that is held back."""
    losses: bool = False
    """Whether the table tells each row's last loss beside those of predictors that see nothing of an image."""

    @property
    def end_to_end(self) -> str:
        """The variant whose curve tells what stopping early would have done; empty where nothing trains end to end."""
        arms = {name: variant.arm for name, variant in self.variants.items()}
        return self.control if arms[self.control] == "e2e" else next((n for n, arm in arms.items() if arm == "e2e"), "")


def row(arm: Measured = "cached", against: str = "", /, **settings: Any) -> Variant:
    """A variant; `__` in a name stands for the dot, which Python does not allow: `row(cache__views=4)`."""
    return Variant({key.replace("__", "."): value for key, value in settings.items()}, arm, against)


STEADY: Settings = {"train.lr_schedule": "constant"}
"""Every point of a curve is then a place where one may stop."""
SHORT: Settings = {
    "data.source": "cifar10",
    "model.image_size": 32,
    "model.patch_size": 4,
    "mask.groups": 4,
    "cache.views": 2,
    "cache.shard_rows": 512,
    "cache.encode_batch": 256,
    "schedule.cuts": [0, 3, 6, 9],
    "schedule.epochs": [8, 4, 4, 4],
    "train.batch_size": 128,
    **STEADY,
    "train.warmup_epochs": 1.0,
    "eval.every": 2,
    "eval.train_limit": 10_000,
    "eval.val_limit": 0,
}
"""CIFAR-10 at 64 tokens, 12 blocks of width 192, 20 epochs, 12 of which learn with frozen blocks. The rate is constant,
so that every point of a curve is a place where one may stop, and runs that differ after stage 0 share it. Scores are of
all evaluation images: a score of 2,000 has a standard error of 1.1 points at 40 %, one of 400 has 2.4. Without a
network: DATA='path/to/cifar10/train-{000000..000007}.tar', and DATA_VAL likewise where a study does not choose."""


def seeds() -> Study:
    """The sceptic's controls on the sample: three arms, and end to end stopped early, over three seeds.

    Compared: the cached arm with end to end at its end, and with end to end stopped at the cached arm's total time. The
    rate is constant: under the sample's cosine a stopped arm is one whose rate has not fallen yet.
    Data: the recipe's (CONFIG, DATA), scored on the sample's own evaluation images, of other data on a tenth that is
    held out, or on DATA_VAL. Nothing is chosen.
    """
    arms = {"e2e": row("e2e"), "freeze": row("freeze"), "cached": row()}
    question = "Does the cached arm beat end to end, whole and stopped early?"
    return Study(question, arms, "e2e", {**STEADY, "eval.every": 1})


def cached_vs_early_stop() -> Study:
    """Accuracy against seconds: e2e, freeze-only, and cached training with groups, targets and views varied one by one.

    Compared: each with end to end at its end and stopped after as many seconds; all but other targets and the idea as
    it was first written down start from the same stage 0.
    Data: SHORT; report with DATA_VAL, which nothing is chosen on.
    """
    return Study(
        "Does cached training beat stopping early?",
        {
            "e2e": row("e2e"),
            "freeze": row("freeze"),
            "cached": row(),
            "groups-2": row(mask__groups=2),
            "groups-1": row(mask__groups=1),
            "views-1": row(cache__views=1),
            "views-4": row(cache__views=4),
            "views-8": row(cache__views=8),
            "hog": row(target__kind="hog"),
            "features": row(target__kind="features"),
            "original": row(target__kind="features", mask__groups=1, cache__views=8),
        },
        "e2e",
        SHORT,
    )


def plans() -> Study:
    """The plan space: length of stage 0, cuts, epochs by cut, rate at stage starts, new decoder, pruned decoder, fresh
    views, heads at several depths.

    Compared: each plan with end to end stopped after as many seconds; variations of a plan also with that plan. A rate
    that restarts acts on stage 0 too, so its plan is compared with end to end at the same, higher rate, whose gain is
    not the plan's. Early freezing (4 epochs) is left to `multiscale`.
    Data: the training images of SHORT only, for it chooses: a tenth is held back to score on, and DATA_VAL is refused.
    One seed; what is chosen is then reported with `cached_vs_early_stop`, three seeds and DATA_VAL.
    """
    late: Settings = {"schedule.cuts": [0, 6], "schedule.epochs": [12, 8]}
    faster: Settings = {"train.lr": 2e-3}

    def varied(against: str = "12-8-at-6", **settings: Any) -> Variant:
        return Variant({**late, **row(**settings).settings}, against=against)

    return Study(
        "Which plan lies above end to end at equal seconds?",
        {
            "e2e": row("e2e"),
            "12-8-at-6": varied("e2e"),
            "12-8-at-3": row(schedule__cuts=[0, 3], schedule__epochs=[12, 8]),
            "8-4-4-4": row(),
            "new-decoder": varied(decoder__carry=False),
            "pooled-views-4": varied(mask__groups=2, cache__views=4),
            "ring": varied(cache__refresh=2),
            "10-10-at-6": row(schedule__cuts=[0, 6], schedule__epochs=[10, 10]),
            "8-8-12-at-3-6": row(schedule__cuts=[0, 3, 6], schedule__epochs=[8, 8, 12]),
            "8-6-8-12": row(schedule__epochs=[8, 6, 8, 12]),
            "four-heads": varied(heads__blocks=[2, 4, 10, 12]),
            "pruned": varied(decoder__share=0.5),
            "e2e-higher-rate": Variant(faster, "e2e"),
            "restart-higher-rate": varied("e2e-higher-rate", **{"train.lr_restart": True}, **faster),
        },
        "e2e",
        SHORT,
        seeds=(0,),
        chooses=True,
    )


def multiscale() -> Study:
    """One decoder, 4 and 12 local heads, all predicting HOG, frozen early and late.

    Compared: early freezing with late freezing of the same heads; heads of one count also share their end-to-end arm.
    Data: SHORT. Scales are those of one token grid, since 64 tokens have too few pixels for LocalMIM's finest.
    """
    four, twelve = {"heads.blocks": [2, 4, 10, 12]}, {"heads.blocks": list(range(1, 13))}
    variants = {}
    for name, heads in {"one": {}, "four": four, "twelve": twelve}.items():
        variants[f"{name}-late"] = Variant({**heads})
        variants[f"{name}-early"] = Variant({**heads, "schedule.epochs": [4, 4, 4, 8]}, against=f"{name}-late")
        variants[f"{name}-e2e"] = Variant({**heads}, "e2e", against=f"{name}-late")
    return Study("Do local heads allow earlier freezing?", variants, "one-late", {**SHORT, "target.kind": "hog"})


def freezeout() -> Study:
    """FreezeOut with AdamW: spacing, t0 and scaled rates, against freezing at the same times with one constant rate.

    Compared: each with the row of its spacing and t0 whose layers share the constant rate until they freeze.
    Data: SHORT; 20 epochs in all. End to end at the constant rate is the row that nothing freezes in: of a run that
    freezes by the explicit schedule, since arms share stage 0, in which FreezeOut freezes blocks in place.
    """
    variants = {"e2e": row("e2e", schedule__kind="explicit")}
    for scale, t0 in (("linear", 0.5), ("squared", 0.65), ("cubic", 0.65), ("cubic", 0.8), ("cubic", 0.9)):
        when: dict[str, Any] = {"schedule.scale": scale, "schedule.t0": t0}
        name = f"{scale}-{t0}"
        variants[name] = Variant({**when, "schedule.layer_rates": "shared"}, against="e2e")
        variants[f"{name}-cosines"] = Variant({**when, "schedule.scale_lr": False}, against=name)
        variants[f"{name}-scaled"] = Variant({**when, "schedule.scale_lr": True}, against=name)
    return Study("Does FreezeOut's schedule help with AdamW?", variants, "e2e", {**SHORT, "schedule.kind": "freezeout"})


def rates() -> Study:
    """Constant, cosine, warm-up-stable-decay and schedule-free at a short budget, and large first rates.

    Compared: each with the cosine of its own arm, at the end: only the constant rate may be stopped anywhere.
    Data: SHORT.
    """
    names = ("cosine", "constant", "wsd", "schedule_free")
    kinds: dict[str, Settings] = {name: {"train.lr_schedule": name} for name in names}
    for name in names[:2]:
        kinds |= {f"{name}-lr-{lr}": {"train.lr_schedule": name, "train.lr": lr} for lr in (2e-3, 4e-3)}
    variants = {f"{name}-e2e": Variant(settings, "e2e") for name, settings in kinds.items()}
    variants |= {name: Variant(settings, against="cosine") for name, settings in kinds.items()}
    return Study("Which learning rate schedule at short budgets?", variants, "cosine-e2e", SHORT)


def loss_weights() -> Study:
    """Four local heads with losses weighted equally, 4:3:2:1, 1/4:1/3:1/2:1, and from the one list to the other.

    Compared: each with equal weights. Data: SHORT, pixels at the token grid after blocks 3, 6, 9 and 12.
    """
    return Study(
        "How should the losses of the heads be weighted?",
        {
            "equal": row(),
            "falling": row(heads__weights="4,3,2,1"),
            "rising": row(heads__weights="1/4,1/3,1/2,1"),
            "curriculum": row(heads__weights="4,3,2,1:1/4,1/3,1/2,1"),
            "e2e": row("e2e"),
        },
        "equal",
        {**SHORT, "heads.blocks": [3, 6, 9, 12]},
    )


def early_peak() -> Study:
    """Longer runs, scored every epoch, by arm and schedule: where kNN peaks, and how far it falls after that.

    Compared: each with end to end at a constant rate; the columns of the peak tell the rest. A peak of e2e at both
    schedules speaks for the method, of one schedule for that, of freeze and cached only for freezing. The peak is read
    off the scored curve, so it is biased upwards, in all rows alike. Data: SHORT.
    """
    variants: dict[str, Variant] = {}
    for name in ("constant", "cosine"):
        for arm in ("e2e", "freeze", "cached"):
            variants[f"{name}-{arm}"] = Variant({"train.lr_schedule": name}, arm)
    longer = {"schedule.epochs": [12, 8, 8, 12], "eval.every": 1}
    return Study("Is an early peak due to freezing, schedule or method?", variants, "constant-e2e", {**SHORT, **longer})


def masking() -> Study:
    """Mask ratios from 60 to 95 %, a ratio that rises, and difficulty by distance, for cached training.

    Compared: each with 75 %. Four groups hold a quarter of the tokens, so lower ratios have two groups, and so has
    their own control. Data: SHORT.
    """
    return Study(
        "Which masks for cached training?",
        {
            "75": row(),
            "85": row(mask__ratio=0.85),
            "90": row(mask__ratio=0.9),
            "95": row(mask__ratio=0.95),
            "75-two-groups": row(mask__groups=2),
            "60-two-groups": row("cached", "75-two-groups", mask__ratio=0.6, mask__groups=2),
            "75-to-90": row(mask__ratio_end=0.9),
            "far-tokens": row(mask__distance_power=1.0),
            "near-tokens-first": row(mask__distance_start=0.25),
            "e2e": row("e2e"),
        },
        "75",
        SHORT,
    )


def distillation() -> Study:
    """Pixels against a frozen teacher and a moving average, the last block's or, between heads, transitive.

    Compared: each with pixels under the same heads. Data: SHORT.
    """
    three = {"heads.blocks": [4, 8, 12]}
    taught = {"target.kind": "teacher"}
    variants = {
        "pixels": row(),
        "frozen": Variant(taught),
        "ema": Variant({**taught, "teacher.kind": "ema"}),
        "pixels-three": Variant(three),
    }
    for pairs in ("last", "same", "earlier", "later"):
        settings = {**three, **taught, "teacher.pairs": pairs}
        variants[f"frozen-three-{pairs}"] = Variant(settings, against="pixels-three")
    return Study("Do self-distillation and frozen teachers help?", variants, "pixels", SHORT)


def finetuning() -> Study:
    """Supervised fine-tuning from one pre-trained encoder: blocks frozen and cached, views, heads at several depths.

    Compared: each with training all blocks. The encoder is the same for all rows of a seed. Seconds are those of
    fine-tuning alone, its cache included. Data: SHORT; every image needs a label.
    """
    return Study(
        "What does freezing cost in fine-tuning?",
        {
            "all-blocks": row("finetune"),
            "frozen-6": row("finetune", finetune__freeze=6),
            "frozen-9": row("finetune", finetune__freeze=9),
            "frozen-6-views-1": row("finetune", "frozen-6", finetune__freeze=6, finetune__views=1),
            "frozen-6-views-4": row("finetune", "frozen-6", finetune__freeze=6, finetune__views=4),
            "three-heads": row("finetune", finetune__heads=[6, 9, 12]),
            "frozen-6-three-heads": row("finetune", "frozen-6", finetune__freeze=6, finetune__heads=[6, 9, 12]),
        },
        "all-blocks",
        {**SHORT, "finetune.epochs": 10, "finetune.batch_size": 128},
    )


def codecs() -> Study:
    """What int8 and bit-rounded caches cost in probe accuracy, in the later cuts only and chained over all of them.

    Compared: each with float16 in all cuts, from the same stage 0. Data: SHORT.
    """
    return Study(
        "What do smaller codecs cost?",
        {
            "float16": row(),
            "bfloat16": row(cache__codec="bfloat16"),
            "int8": row(cache__codec="int8"),
            "int8-later": row(cache__later_codec="int8"),
            "int8-blocks-192": row(cache__codec="int8", cache__block=192),
            "bitround-6": row(cache__filter="bitround-6+zstd"),
            "bitround-4": row(cache__filter="bitround-4+zstd"),
            "e2e": row("e2e"),
        },
        "float16",
        SHORT,
    )


def leak() -> Study:
    """Full mode against grouped and pooled, for features and pixels: final loss, and probes after training.

    Compared: each with four groups of the same target. The loss of full mode lies below that of groups because the task
    is easier, so only probes compare; each loss stands beside that of the mean target and that of the mean at every
    place, the least that a decoder without context can come to. Data: SHORT.
    """
    variants = {}
    for target in ("pixels", "features"):
        for groups in (4, 2, 1):
            against = "" if groups == 4 else f"{target}-groups-4"
            settings = {"target.kind": target, "mask.groups": groups}
            variants[f"{target}-groups-{groups}"] = Variant(settings, against=against)
    return Study("How strong is full mode's leak?", variants, "pixels-groups-4", SHORT, losses=True)


STUDIES: dict[str, Callable[[], Study]] = {
    make.__name__: make
    for make in (
        *(seeds, cached_vs_early_stop, plans, multiscale, freezeout, rates, loss_weights, early_peak, masking),
        *(distillation, finetuning, codecs, leak),
    )
}


def study(name: str) -> Study:
    """A study by name. Raises ConfigError naming the nearest one."""
    if name not in STUDIES:
        raise ConfigError(f"no study {name}; {hint(name, STUDIES)}")
    return STUDIES[name]()


def hint(name: str, known: Iterable[str]) -> str:
    """What may have been meant by a name that is not known."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
