"""The check that the settings of a run make sense, alone and together: each problem is one line that names value, bound
and remedy, and refuses the run before anything starts. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator

from cache.codecs import codec_problem, parse_filter
from cache.errors import CacheError
from cache.place import holds_secret
from models.config import IMAGE_TARGETS, SCALES, SIZES, TeacherConfig, loss_weights
from pipeline.config import ConfigError, PipelineConfig, get
from pipeline.jobs import cluster_problems
from pipeline.timing import timing_problems
from stages.compiling import compiler

BOUNDS = {
    "seed": "[0, inf)",
    "data.limit": "[0, inf)",
    "data.cache_gb": "[0, inf)",
    "data.flip": "[0, 1]",
    "model.image_size": "[1, inf)",
    "model.patch_size": "[1, inf)",
    "model.width": "[0, inf)",
    "model.depth": "[0, inf)",
    "model.heads": "[0, inf)",
    "model.registers": "[0, inf)",
    "mask.ratio": "(0, 1)",
    "mask.ratio_end": "[0, 1)",
    "mask.block": "[1, inf)",
    "mask.distance_power": "[0, inf)",
    "mask.distance_start": "(0, 1]",
    "teacher.block": "[0, inf)",
    "teacher.momentum": "[0, 1]",
    "decoder.depth": "[1, inf)",
    "decoder.width": "[0, inf)",
    "decoder.heads": "[0, inf)",
    "decoder.share": "(0, 1]",
    "schedule.t0": "(0, 1]",
    "schedule.check_every": "(0, inf)",
    "schedule.probe_images": "[1, inf)",
    "schedule.settle_below": "(0, inf)",
    "schedule.settle_checks": "[1, inf)",
    "cache.views": "[1, inf)",
    "cache.block": "[1, inf)",
    "cache.max_error": "(0, inf)",
    "cache.shard_rows": "[1, inf)",
    "cache.encode_batch": "[0, inf)",
    "cache.shuffle_shards": "[1, inf)",
    "cache.budget_gb": "[0, inf)",
    "cache.memory_mb": "[1, inf)",
    "cache.refresh": "[0, inf)",
    "cache.refresh_ahead": "[0, inf)",
    "store.retries": "[0, inf)",
    "store.wait": "[0, inf)",
    "store.timeout": "(0, inf)",
    "store.part_mb": "[5, inf)",
    "train.batch_size": "[1, inf)",
    "train.accumulate": "[1, inf)",
    "train.max_steps": "[0, inf)",
    "train.lr": "(0, inf)",
    "train.min_lr": "[0, inf)",
    "train.decay_share": "(0, 1]",
    "train.warmup_epochs": "[0, inf)",
    "train.early_stop": "[0, inf)",
    "train.weight_decay": "[0, inf)",
    "train.beta2": "[0, 1)",
    "train.clip": "[0, inf)",
    "train.drop_path": "[0, 1)",
    "train.layer_drop": "[0, 1)",
    "train.threads": "[0, inf)",
    "train.loader_threads": "[1, inf)",
    "train.prefetch": "[1, inf)",
    "train.save_every": "(0, inf)",
    "eval.every": "[0, inf)",
    "eval.train_limit": "[0, inf)",
    "eval.val_limit": "[0, inf)",
    "eval.knn_k": "[1, inf)",
    "eval.batch_size": "[1, inf)",
    "eval.probe_epochs": "[1, inf)",
    "eval.attentive_epochs": "[1, inf)",
    "eval.probe_batch": "[2, inf)",
    "eval.probe_hold_back": "(0, 1)",
    "finetune.epochs": "[1, inf)",
    "finetune.batch_size": "[1, inf)",
    "finetune.accumulate": "[1, inf)",
    "finetune.max_steps": "[0, inf)",
    "finetune.lr": "(0, inf)",
    "finetune.min_lr": "[0, inf)",
    "finetune.warmup_epochs": "[0, inf)",
    "finetune.weight_decay": "[0, inf)",
    "finetune.beta2": "[0, 1)",
    "finetune.layer_decay": "(0, 1]",
    "finetune.clip": "[0, inf)",
    "finetune.drop_path": "[0, 1)",
    "finetune.mixup": "[0, inf)",
    "finetune.cutmix": "[0, inf)",
    "finetune.label_smoothing": "[0, 1)",
    "finetune.rand_augment": "[0, 10]",
    "finetune.freeze": "[0, inf)",
    "finetune.views": "[1, inf)",
    "cluster.workers": "[0, inf)",
    "cluster.threads": "[0, inf)",
    "cluster.adapt_to": "[0, inf)",
    "cluster.ahead": "[1, inf)",
    "cluster.straggler": "[0, inf)",
    "cluster.patience": "(0, inf)",
    "cluster.lifetime": "[0, inf)",
    "cluster.stagger": "[0, inf)",
    "bench.rows": "[4, inf)",
    "bench.rounds": "[1, inf)",
    "bench.threads": "[1, inf)",
    "bench.batch": "[1, inf)",
    "bench.shard_rows": "[1, inf)",
    "bench.shards": "[1, inf)",
}
"""The interval in which a single number makes sense."""
URLS = ("data.source", "data.val_source", "cache.root", "model.weights")
"""Settings that may name something behind a URL."""

def check(config: PipelineConfig) -> None:
    """Refuses what makes no sense. Raises ConfigError with value, bound and remedy."""
    for key, bound in BOUNDS.items():
        if not _inside(value := get(config, key), bound):
            raise ConfigError(f"{key} = {value} is outside {bound}; choose a value inside")
    for problems in (*PROBLEMS, cache_problems, probe_problems, finetune_problems, cluster_problems):
        for problem in problems(config):
            raise ConfigError(problem)


def _inside(value: float, bound: str) -> bool:
    low, high = (float(end) for end in bound[1:-1].split(","))
    return (low <= value if bound[0] == "[" else low < value) and (value <= high if bound[-1] == "]" else value < high)


def _model_problems(config: PipelineConfig) -> Iterator[str]:
    model, decoder = config.model, config.decoder
    if model.image_size % model.patch_size:
        yield (
            f"model.patch_size = {model.patch_size} does not divide model.image_size = {model.image_size}; "
            f"try model.image_size={max(1, model.image_size // model.patch_size) * model.patch_size}"
        )
    if not all(0 <= mean <= 1 for mean in model.mean):
        yield f"model.mean = {list(model.mean)} is not of values in 0..1; for values of 0..255 divide by 255"
    if not all(0 < std <= 1 for std in model.std):
        yield f"model.std = {list(model.std)} is not of values in 0..1 and above 0; for values of 0..255 divide by 255"
    encoder_width = model.width or SIZES.get(model.name, (0,))[0]
    decoder_sizes = decoder.sizes(encoder_width) if encoder_width else (decoder.width, decoder.heads)
    for name, width, heads in (("model", model.width, model.heads), ("decoder", *decoder_sizes)):
        if width % 4:
            yield f"{name}.width = {width} is not divisible by 4, which the sin-cos positions need; change {name}.width"
        if width and heads and width % heads:
            yield f"{name}.width = {width} is not divisible by {name}.heads = {heads}; change either"


def _mask_problems(config: PipelineConfig) -> Iterator[str]:
    mask, tokens = config.mask, config.model.num_tokens
    if tokens % mask.groups:
        yield f"mask.groups = {mask.groups} does not divide the {tokens} tokens of an image; use mask.groups=1"
    for name, ratio in (("mask.ratio", mask.ratio), ("mask.ratio_end", mask.ratio_end or mask.ratio)):
        keep = int(tokens * (1 - ratio))
        if not keep:
            yield f"{name} = {ratio} leaves none of the {tokens} tokens visible; lower {name}"
        if keep > tokens // mask.groups:
            yield (
                f"{name} = {ratio} keeps {keep} of {tokens} tokens, but a group of mask.groups = {mask.groups} "
                f"has only {tokens // mask.groups}; raise {name} or lower mask.groups"
            )
    if mask.block > 1 and mask.block**2 > tokens // 4:
        side = int((tokens // 4) ** 0.5)
        yield f"mask.block = {mask.block} makes squares larger than a quarter of the {tokens} tokens; use 1..{side}"
    if config.decoder.share < 1 and not int(tokens * mask.ratio * config.decoder.share):
        yield f"decoder.share = {config.decoder.share} leaves no hidden token to decode; raise it"


def _heads_problems(config: PipelineConfig) -> Iterator[str]:
    """What is wrong with the heads; their decoders' sizes are the model's business."""
    heads, target, model = config.heads, config.target, config.model
    depth = model.depth or SIZES.get(model.name, (0, 0))[1]
    blocks, count = list(heads.blocks), len(heads.blocks)
    if not blocks:
        for key in ("scales", "targets"):
            if getattr(heads, key):
                yield f"heads.{key} = {list(getattr(heads, key))} without heads.blocks; name the blocks too"
        if heads.weights != "equal":
            yield f"heads.weights = {heads.weights} without heads.blocks weighs nothing; name the blocks too"
        return
    if sorted(set(blocks)) != blocks or blocks[0] < 1 or (depth and blocks[-1] != depth):
        last = depth or "its last"
        yield f"heads.blocks = {blocks} must rise from 1 or more to {last}, since no block behind the last head learns"
    for key in ("scales", "targets"):
        if (given := getattr(heads, key)) and len(given) != count:
            yield f"heads.{key} = {list(given)} and heads.blocks = {blocks} differ in length; give every head one"
    try:
        loss_weights(heads.weights, count)
    except ValueError as error:
        yield f"heads.weights: {error}; give every head of heads.blocks = {blocks} a weight"
    kinds = heads.targets or (target.kind,) * count
    grid = model.image_size // model.patch_size
    for kind, scale in zip(kinds, heads.scales or (1.0,) * count, strict=True):
        if scale not in SCALES:
            yield f"heads.scales has {scale}; use 4, 2, 1 or 0.5"
        if scale != 1 and kind not in IMAGE_TARGETS:
            yield f"heads.scales has {scale} for a head of {kind}, which are there for tokens only; use scale 1 for it"
        if scale > 1 and model.patch_size % int(scale):
            yield f"heads.scales has {scale:g}, which does not divide model.patch_size = {model.patch_size}; use 1"
        if scale < 1 and grid % 2:
            yield f"heads.scales has {scale}, but a grid of {grid} tokens a side has no 2x2 squares; use 1, 2 or 4"
        if scale < 1 and config.decoder.share < 1:
            yield f"heads.scales has {scale}, which needs all tokens, but decoder.share = {config.decoder.share}; use 1"


def _teacher_problems(config: PipelineConfig) -> Iterator[str]:
    teacher, usual, model = config.teacher, TeacherConfig(), config.model
    depth = model.depth or SIZES.get(model.name, (0, 0))[1]
    changed = [name for name, value in vars(teacher).items() if value != getattr(usual, name)]
    if "teacher" not in (config.heads.targets or (config.target.kind,)):
        for name in changed:
            yield f"teacher.{name} = {getattr(teacher, name)} teaches no head; set target.kind=teacher"
        return
    if teacher.kind == "frozen" and len(config.schedule.cuts) == 1:
        cuts = list(config.schedule.cuts)
        yield f"teacher.kind = frozen is what stage 0 ends with, but schedule.cuts = {cuts} ends there; use ema"
    if teacher.kind == "frozen" and "momentum" in changed:
        yield f"teacher.momentum = {teacher.momentum} moves nothing with teacher.kind = frozen; use ema"
    if teacher.pairs != "last" and teacher.block:
        yield f"teacher.block = {teacher.block} is not asked for with teacher.pairs = {teacher.pairs}; set it to 0"
    if depth and teacher.block > depth:
        yield f"teacher.block = {teacher.block} is more than the {depth} blocks there are; use 0..{depth}"


def _data_problems(config: PipelineConfig) -> Iterator[str]:
    data, train = config.data, config.train
    for key, (low, high), top in (("scale", data.crop_scale, 1.0), ("ratio", data.crop_ratio, float("inf"))):
        if not 0 < low <= high <= top:
            yield f"data.crop_{key} = [{low}, {high}] is not 0 < smallest <= largest <= {top}; reorder or lower it"
    for key in URLS:
        if holds_secret(get(config, key)):
            yield (
                f"{key} is a URL with a password or a signature in it, which every file of the run would repeat; leave "
                "it out, keys come from the environment (AWS_ACCESS_KEY_ID, ...) or the store's usual files"
            )
    if not data.source:
        yield "data.source is empty; give sample, a folder, tars or a torchvision name"
    if train.batch_size % train.accumulate:
        parts = f"train.accumulate = {train.accumulate}"
        yield f"train.batch_size = {train.batch_size} is not divisible by {parts}; change either"
    if train.compile == "on" and not compiler():
        yield "train.compile = on needs a C++ compiler, and neither $CXX, g++ nor clang++ is here; use compile=off"
    if train.compile == "on" and train.layer_drop:
        yield (
            f"train.compile = on compiles anew whenever other blocks are skipped, and train.layer_drop = "
            f"{train.layer_drop} skips some at every step; use train.compile=off"
        )
    if train.min_lr > train.lr:
        yield f"train.min_lr = {train.min_lr} is above train.lr = {train.lr}; lower train.min_lr"
    kind, _, index = train.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        yield f"train.device = {train.device} is none of auto, cpu, cuda, cuda:<n>; choose one of them"


def _timing_problems(config: PipelineConfig) -> Iterator[str]:
    return timing_problems(config.schedule, config.train, config.eval)


def _start_problems(config: PipelineConfig) -> Iterator[str]:
    """Stage 0 may train for no epoch only where a file has trained its encoder already and a later stage goes on."""
    epochs = list(config.schedule.epochs)
    if not epochs or epochs[0]:
        return
    if not config.model.weights:
        yield (
            f"schedule.epochs = {epochs} starts stage 1 from an encoder that nothing has trained; give a checkpoint "
            "with model.weights=<file>, or stage 0 at least 1 epoch"
        )
    elif config.schedule.kind != "explicit" or not any(epochs):
        yield (
            f"schedule.epochs = {epochs} with schedule.kind = {config.schedule.kind} trains stage 0 for 0 epochs; that "
            "needs explicit and a later stage that trains"
        )


PROBLEMS = (
    *(_model_problems, _mask_problems, _heads_problems, _teacher_problems),
    *(_data_problems, _timing_problems, _start_problems),
)
"""What does not go together, in the order in which it is looked for."""


def cache_problems(config: PipelineConfig) -> Iterator[str]:
    cache, width = config.cache, config.model.width or SIZES.get(config.model.name, (0,))[0]
    try:
        keepbits, compression = parse_filter(cache.filter)
    except CacheError as error:
        yield str(error)
        return
    if cache.backend == "webdataset" and compression:
        yield f"cache.filter = {cache.filter} compresses no member of a tar; use cache.backend=zarr or none"
    for name in ("codec", "later_codec"):
        codec = getattr(cache, name)
        if codec and (problem := codec_problem(codec, width, cache.block, keepbits)):
            yield problem.replace("cache.codec", f"cache.{name}")
    if cache.refresh and "teacher" in (config.target.kind, *config.heads.targets) and config.teacher.kind == "frozen":
        yield (
            f"cache.refresh = {cache.refresh} replaces the views that the teacher's features are of; use "
            "teacher.kind=ema or cache.refresh=0"
        )
    if cache.refresh and config.schedule.caches == "cost":
        yield (
            f"cache.refresh = {cache.refresh} builds every cache from images and adds a view at every turn, which "
            "schedule.caches = cost does not count; use schedule.caches=given or cache.refresh=0"
        )
    if cache.refresh_ahead and not cache.refresh:
        yield (
            f"cache.refresh_ahead = {cache.refresh_ahead} makes the next views of a ring, and cache.refresh = 0 keeps "
            "the views; set cache.refresh=1 or cache.refresh_ahead=0"
        )
    if cache.later_codec and len(config.schedule.cuts) < 3 and config.schedule.kind == "explicit":
        cuts = list(config.schedule.cuts)
        yield f"cache.later_codec = {cache.later_codec} is for a second cut, but schedule.cuts = {cuts}; leave it empty"
    if cache.over_budget == "live" and not cache.budget_gb:
        yield "cache.over_budget = live without cache.budget_gb leaves nothing out; set cache.budget_gb above 0"
    if cache.over_budget == "live" and cache.refresh:
        yield (
            f"cache.refresh = {cache.refresh} turns the views of caches, and cache.over_budget = live may leave stages "
            "without one; use cache.over_budget=refuse or cache.refresh=0"
        )


def probe_problems(config: PipelineConfig) -> Iterator[str]:
    evaluation = config.eval
    if not evaluation.probes:
        yield "eval.probes is empty; name at least one of knn, logistic, sgd, lars, attentive"
    for name in ("probe_rates", "lars_rates", "attentive_rates"):
        rates = list(getattr(evaluation, name))
        if not rates or not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
            yield f"eval.{name} = {rates} is no list of different rates above 0; write for example [0.03,0.1,0.3]"


def finetune_problems(config: PipelineConfig) -> Iterator[str]:
    finetune = config.finetune
    if finetune.batch_size % finetune.accumulate:
        parts = f"finetune.accumulate = {finetune.accumulate}"
        yield f"finetune.batch_size = {finetune.batch_size} is not divisible by {parts}; change either"
    if finetune.batch_size % 2 and (finetune.mixup or finetune.cutmix):
        yield (
            f"finetune.batch_size = {finetune.batch_size} is odd, but mixing pairs the images of a batch; make it "
            "even, or set finetune.mixup=0 finetune.cutmix=0"
        )
    if finetune.min_lr > finetune.lr:
        yield f"finetune.min_lr = {finetune.min_lr} is above finetune.lr = {finetune.lr}; lower finetune.min_lr"
    heads, depth = list(finetune.heads), config.model.depth or SIZES.get(config.model.name, (0, 0))[1]
    first = max(1, finetune.freeze)
    if sorted(set(heads)) != heads or any(head < first for head in heads):
        yield f"finetune.heads = {heads} does not rise from finetune.freeze = {finetune.freeze} or 1 on; write [6,9,12]"
    if depth and finetune.freeze > depth:
        yield f"finetune.freeze = {finetune.freeze} is more than the {depth} blocks there are; lower it"
    if depth and heads and heads[-1] > depth:
        yield f"finetune.heads = {heads} has more than the {depth} blocks there are; use 1..{depth}"
