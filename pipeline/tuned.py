"""What supervised fine-tuning wants: from which encoder, over which steps, behind which cache, and everything that can
change its outcome. `decide` judges by it. Free of torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from models.config import SIZES
from pipeline.config import ConfigError
from pipeline.needs import Need
from pipeline.show import console, table
from stages.labels import num_classes, require_labels
from stages.segment import Segment
from stages.views import view_transform_id

if TYPE_CHECKING:
    from pipeline.decide import Wanted

FINETUNE_VERSION = 1
"""Bumped when fine-tuning computes other numbers for a reason that no setting tells."""

BY_STEPS = frozenset({"epochs", "max_steps", "views"})
"""Settings that act through the number of steps, or only where blocks are frozen."""


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning as the settings ask for it, from the encoder that a stage (a number) or an arm (a name) ends with."""

    wanted: Wanted
    start: int | str

    @property
    def encoder(self) -> str:
        """What it starts from: `stage 3` or `arm e2e`."""
        return f"stage {self.start}" if isinstance(self.start, int) else f"arm {self.start}"

    @property
    def record(self) -> dict[str, Any] | None:
        """What is known of the encoder that it starts from."""
        return self.wanted.record(self.wanted.paths.encoder(self.encoder))

    @cached_property
    def segment(self) -> Segment:
        """All of it; incomplete batches are dropped."""
        finetune = self.wanted.config.finetune
        per_epoch = len(self.wanted.data.train) // finetune.batch_size
        steps = finetune.epochs * per_epoch
        steps = min(steps, finetune.max_steps) if finetune.max_steps else steps
        return Segment(finetune.freeze, 0, finetune.epochs, 0, steps, per_epoch)

    def refuse_what_cannot_be(self) -> None:
        """Raise DataError or ConfigError for images without labels, batches with more images than there are, and heads
        that the encoder has no place for."""
        require_labels(self.wanted.data)
        finetune, identity, model = self.wanted.config.finetune, self.wanted.identity, self.wanted.config.model
        if finetune.pool == "token" and not (model.class_token if model.name in SIZES else identity["prefix"]):
            raise ConfigError(f"finetune.pool=token needs a class token, {model.name} has none; use finetune.pool=mean")
        depth = int(identity["depth"])
        if max(finetune.freeze, *finetune.heads, 1) > depth:
            raise ConfigError(
                f"finetune.freeze = {finetune.freeze} and finetune.heads = {list(finetune.heads)} must lie within the "
                f"{depth} blocks of {model.name}; lower them"
            )
        batch, images = self.wanted.config.finetune.batch_size, len(self.wanted.data.train)
        if not self.segment.steps:
            raise ConfigError(
                f"finetune.batch_size = {batch} does not fit {images} training images; it may be 1..{images}"
            )

    @property
    def views(self) -> str:
        """Names everything that decides a view's pixels."""
        config = self.wanted.config
        return view_transform_id(config.data, config.model.image_size, config.finetune.rand_augment)

    @property
    def need(self) -> Need | None:
        """The cache of what the frozen blocks make of all tokens of every view; None where nothing is frozen."""
        finetune, start = self.wanted.config.finetune, self.start
        if not finetune.freeze:
            return None
        draft = replace(
            self.wanted.draft_spec(0),
            cut=finetune.freeze,
            groups=1,
            mask_ratio=0.0,
            mask_block=1,
            views=finetune.views,
            view_transform=self.views,
            pixels=False,
        )
        stage, arm = (start, "") if isinstance(start, int) else (0, start)
        return Need("cache finetune", stage, draft, None, arm, finetune.rand_augment, tunes=True)

    def inputs(self) -> dict[str, Any]:
        """Everything that can change the outcome, by the setting's name."""
        wanted, config = self.wanted, self.wanted.config
        inputs: dict[str, Any] = {"seed": config.seed, "data": wanted.data.train.digest, "version": FINETUNE_VERSION}
        inputs |= {"classes": num_classes(wanted.data), "data.views": self.views, "encoder": self.encoder}
        inputs |= {"encoder weights": (self.record or {}).get("weights")} | wanted.model_inputs
        inputs |= {f"finetune.{k}": v for k, v in asdict(config.finetune).items() if k not in BY_STEPS}
        inputs |= {"finetune.steps": self.segment.steps, "finetune.steps_per_epoch": self.segment.steps_per_epoch}
        inputs |= {"train.precision": config.train.precision} | config.cache.order_inputs
        if config.finetune.freeze:
            inputs |= {"finetune.views": config.finetune.views} | config.cache.inputs()
        return inputs


def last_tuning(wanted: Wanted) -> Tuning | None:
    """Fine-tuning from where the run's last one started; None where there was none."""
    record = wanted.record(wanted.paths.finetune)
    if record is None:
        return None
    kind, _, which = str(record["from"]).partition(" ")
    if kind == "arm":
        return Tuning(wanted, which)
    return Tuning(wanted, min(int(which), len(wanted.segments) - 1))


def show_finetuned(wanted: Wanted) -> None:
    """Print the accuracy of every head of a run that has been fine-tuned."""
    record = wanted.record(wanted.paths.finetune)
    assert record is not None and record["status"] == "done", "it has just been done, or found current"
    rows = table("head after block", "top-1", "top-5")
    for head in record["heads"]:
        best = "  best" if head["after"] == record["best_head"] and len(record["heads"]) > 1 else ""
        top5 = "-" if head["top5"] is None else f"{head['top5']:.3f}"
        rows.add_row(str(head["after"]), f"{head['top1']:.3f}{best}", top5)
    out = console()
    out.print(rows)
    out.print(f"from {record['from']}, on {record['evaluated']} evaluation images; {wanted.paths.finetune.json}")
