"""`permafrost export`: a trained encoder as a folder that `timm.create_model("local-dir:<folder>", pretrained=True)`
loads, weights and architecture together. The last stop of the data path: what is exported needs nothing from here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from timm.models import save_for_hf

from models.config import ModelConfig, model_name
from models.families import timm_args
from pipeline import __version__
from pipeline.config import ConfigError
from pipeline.decide import Verdict, Wanted, judge_arm, judge_stage
from pipeline.desk import at_work
from pipeline.job import Job
from pipeline.layout import StagePaths
from stages.views import EVALUATION_SHARE

OF_OTHER_WEIGHTS = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes")
"""What timm says of the weights that it publishes under the architecture's name, and is not true of ours."""


def run_export(job: Job) -> None:
    """Write the encoder of a stage or an arm, by default of the last stage that is trained, to `<run>/export`."""
    with at_work(job) as desk:
        verdict, paths = chosen(desk.wanted, job.target)
        folder = job.paths.export
        write_export(folder, job.config.model, paths, f"Permafrost {__version__}, {verdict.what}, {verdict.reason}")
        desk.log.message(
            f"{verdict.what}: written to {folder}; "
            f'timm.create_model("local-dir:{folder.absolute()}", pretrained=True) loads it'
        )


def chosen(wanted: Wanted, target: str | int | None) -> tuple[Verdict, StagePaths]:
    """The stage or arm to export. ConfigError where it is not trained with the settings as they are."""
    stages = range(len(wanted.segments))
    if target is None:
        verdicts = {stage: judge_stage(wanted, stage) for stage in stages}
        target = max((stage for stage in stages if verdicts[stage].current), default=0)
    if isinstance(target, int):
        verdict, paths, remedy = judge_stage(wanted, target), wanted.paths.stage(target), f"make stage-{target}"
    else:
        verdict, paths, remedy = judge_arm(wanted, target), wanted.paths.arm(target), f"make {target}"
    if not verdict.current:
        raise ConfigError(f"{verdict.what} is {verdict.state} ({verdict.reason}); run `{remedy}` first")
    return verdict, paths


def write_export(folder: Path, config: ModelConfig, paths: StagePaths, description: str) -> None:
    """`model.safetensors` and `config.json`, all at once: a kill leaves the old folder, the new one, or none.

    The exported model's `forward_features` gives the tokens behind the last norm, its `forward` their mean over
    patches, the feature that kNN and linear probe score.
    """
    # Patch tokens pooled behind the last norm, as our probes do; timm would move the norm behind the pooling.
    pooled = {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": False}
    vit = timm.create_model(model_name(config.name), **timm_args(config) | pooled)
    vit.load_state_dict(load_file(paths.model))
    made = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    card = {"pretrained_cfg": dict.fromkeys(OF_OTHER_WEIGHTS) | {"description": description}}
    save_for_hf(vit, str(made), model_config=card, data_config=preprocessing(config), safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    made.replace(folder)


def preprocessing(config: ModelConfig) -> dict[str, Any]:
    """How images come in, in timm's words: the centre view that evaluation cuts. Of images no larger than the view it
    takes the whole, for which timm's word would be a `crop_pct` of 1."""
    return {
        "input_size": (3, config.image_size, config.image_size),
        "interpolation": "bicubic",
        "crop_pct": EVALUATION_SHARE,
        "crop_mode": "center",
        "mean": config.mean,
        "std": config.std,
    }
