"""`permafrost probe`: the encoders of a run scored with every probe that `eval.probes` asks for, as a table with the
setting that won, and as probe.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file

from cache.manifest import atomic_write
from models.vit import ALL, build_encoder, frozen_hash
from pipeline.config import ConfigError
from pipeline.decide import Wanted
from pipeline.inputs import difference
from pipeline.layout import StagePaths
from pipeline.show import console, table
from pipeline.status import records
from pipeline.story import own_probes
from pipeline.work import file_checksum
from stages.scores import Compute, Score, Scores, score

HEADS = {"knn": "kNN", "logistic": "linear", "sgd": "linear, SGD", "lars": "linear, LARS", "attentive": "attentive"}


def probe_again(wanted: Wanted, names: list[str]) -> None:
    """Print the scores of the encoders that are there, by name, and write them. Raises ConfigError when none is."""
    config = wanted.config
    there = {name: wanted.paths.encoder(name) for name in names if is_trained(wanted, name)}
    if not there:
        raise ConfigError(
            f"{wanted.paths.root} has no trained {' or '.join(names)}; run `make all` or `make stage-0` first"
        )
    for name in there:
        refuse_another_model(wanted, name)
    torch.set_num_threads(config.train.threads)
    probes = list(dict.fromkeys(config.eval.probes))
    rows = table("encoder", *(HEADS[probe] for probe in probes), "effective rank", "feature std")
    written: dict[str, Any] = {}
    images = wanted.scored | {"data": wanted.data.train.digest}
    for name, paths, found in scored(wanted, there):
        by_name = {one.probe: one for one in found.scores}
        shown = (said(by_name[probe]) if probe in by_name else "-" for probe in probes)
        rows.add_row(name, *shown, f"{found.effective_rank:.3f}", f"{found.feature_std:.3f}")
        written[name] = {"weights": file_checksum(paths.model), "scored": images} | found.to_dict()
    atomic_write(wanted.paths.probe, (json.dumps(merged(wanted, written, images), indent=2) + "\n").encode())
    console().print(rows)
    if other := sorted(written.keys() - own_probes(written, dict(records(wanted.paths)))):
        told = "other images than those of the run; its report leaves the scores out"
        console().print(f"{', '.join(other)}: {told}", markup=False)


def is_trained(wanted: Wanted, name: str) -> bool:
    """Whether an encoder is there; where its part is being trained again, what lies there is of the time before."""
    paths = wanted.paths.encoder(name)
    return paths.model.exists() and (wanted.record(paths) or {}).get("status") == "done"


def refuse_another_model(wanted: Wanted, name: str) -> None:
    """Raise ConfigError where an encoder's weights are those of another model than the settings describe."""
    record = wanted.record(wanted.paths.encoder(name)) or {}
    wants = json.loads(json.dumps(wanted.model_inputs))
    of_model = {key: value for key, value in record["inputs"].items() if key.startswith("model.")}
    had = {key: value for key, value in of_model.items() if key != "model.weights"}
    if had != wants:
        root = wanted.paths.root
        raise ConfigError(
            f"{name} in {root} has another model than the settings: {difference(had, wants)}; take the run's own "
            f"settings (`make probe RUN={root}`), or train it again"
        )


def scored(wanted: Wanted, there: dict[str, StagePaths]) -> Iterator[tuple[str, StagePaths, Scores]]:
    """The scores of encoders by name; their features come from the run's cluster where one is asked for."""
    config = wanted.config
    if not config.cluster.elsewhere:
        yield from ((name, paths, score_file(wanted, paths)) for name, paths in there.items())
        return
    from pipeline.cluster import task_runner, torch_threads
    from stages.spread import spread_features

    threads = torch_threads(config.cluster, config.train)
    with task_runner(config.cluster, config.train.device, console().print) as run:
        for name, paths in there.items():
            file = str(paths.model.absolute())
            digest = frozen_hash(load_file(file), ALL)
            yield name, paths, score_file(wanted, paths, spread_features(run, file, digest, config.model, threads))


def score_file(wanted: Wanted, paths: StagePaths, compute: Compute | None = None) -> Scores:
    """The scores of the encoder that a stage or an arm ended with."""
    config = wanted.config
    encoder = build_encoder(config.model, config.seed)
    encoder.vit.load_state_dict(load_file(paths.model))
    encoder.set_attention(config.train.device)
    device, precision = config.train.device, config.train.precision
    encoder.to(device)
    size, seed = config.model.image_size, config.seed
    return score(encoder, wanted.data, config.eval, size, device, precision, seed, compute)


def merged(wanted: Wanted, written: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """probe.json with new scores in it; those of other encoders stay while they are of the file that lies there, and of
    the same images, so that they compare."""
    try:
        before: dict[str, Any] = json.loads(wanted.paths.probe.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        before = {}
    kept = {
        name: scores
        for name, scores in before.items()
        if scores.get("scored") == images
        and (file := wanted.paths.encoder(name).model).exists()
        and file_checksum(file) == scores["weights"]
    }
    return dict(sorted((kept | written).items()))


def said(one: Score) -> str:
    """`0.412 (rate 0.3)`; kNN's and the closed form's settings are those of every run, so their number stands alone."""
    return f"{one.top1:.3f}" + (f" (rate {one.setting['rate']:g})" if "rate" in one.setting else "")
