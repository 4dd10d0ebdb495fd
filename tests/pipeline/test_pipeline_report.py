"""The report: every number is one of the run's files, nothing comes from outside, whatever state the run is in."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cache.manifest import read_manifest
from pipeline import __main__ as cli
from pipeline import runner
from pipeline.charts import Stretch, stretches
from pipeline.claims import PROBES
from pipeline.config import ConfigError
from pipeline.layout import RunPaths
from pipeline.report import render, with_commands, write_report
from pipeline.sceptic import refresh
from pipeline.story import read_story, step_events
from pipeline.tables import CURVE, PART_ROWS
from tests.pipeline.toy import job, toy

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, its text, and the texts that say where they come from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text_of_file = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.sources: dict[str, str] = {}
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1][0] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        self.texts.append((tag, data))
        if source := attributes.get("data-from"):
            self.sources[source] = data

    @property
    def text(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("style", "title")).split())

    @property
    def headline(self) -> str:
        return next(data for tag, data in self.texts if tag == "h1")


def page(root: Path) -> Page:
    found = Page(write_report(RunPaths(root)).read_text())
    assert found.wrong == [] and found.open == [], "every element is closed where it should be"
    return found


def value_at(root: Path, source: str) -> Any:
    """The value in a run's file that `file#dotted.path` names."""
    name, _, path = source.partition("#")
    file = next(iter([*root.glob(name), *root.glob(f"cache/{name}")]))
    value: Any = tomllib.loads(file.read_text()) if file.suffix == ".toml" else json.loads(file.read_text())
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


FORMS = {key: form for _, key, form in PART_ROWS} | dict(CURVE)
FORMS |= {"cache_seconds": ".1f", "total_seconds": ".1f", "images": ",d", "ratio": ".2f", "flop_bound": ".2f"}
FORMS |= {f"{arm}_images_per_second": ".0f" for arm in ("e2e", "freeze", "cached")}
FORMS |= {"crowded_seconds": ".1f", "accumulated_error": ".2e", "num_samples": ",d", "place": ".4f", "mean": ".4f"}


def expected(source: str, value: Any) -> str:
    """How the page should write a value of a file."""
    key = source.rpartition(".")[2].partition("#")[2] or source.rpartition(".")[2]
    if source.startswith("config.toml"):
        return str(value).lower() if isinstance(value, bool) else str(value) or '""'
    if value is None:
        return "–"
    if key in (*PROBES, "top1", "top5"):
        return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
    return format(value, FORMS.get(key, ""))


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(finished, tmp_path_factory.mktemp("report") / "toy")


@pytest.fixture(scope="module")
def whole(root: Path) -> Page:
    return page(root)


def test_every_number_is_the_one_in_its_file(root: Path, whole: Page) -> None:
    found = whole
    files = {source.partition("#")[0] for source in found.sources}
    assert {"speedup.json", "config.toml", "stage-2/stage.json", "arms/freeze/stage.json"} <= files
    assert len(found.sources) > 200
    wrong = {
        source: text for source, text in found.sources.items() if text != expected(source, value_at(root, source))
    }
    assert wrong == {}
    for arm in ("e2e", "freeze", "cached"):
        assert {f"speedup.json#arms.{arm}.{key}" for key in ("total_seconds", *PROBES)} <= found.sources.keys()


def test_what_is_computed_from_files_is_right(copy: Path) -> None:
    comparison = json.loads((copy / "speedup.json").read_text())
    comparison["speedup_total"] = 1.5
    comparison["arms"]["e2e"] |= {"total_seconds": 30.0, "knn_top1": 0.5}
    comparison["arms"]["cached"] |= {"total_seconds": 20.0}
    (copy / "speedup.json").write_text(json.dumps(comparison))
    found = page(copy)
    rows = re.sub(r"\s+", " ", found.text)
    assert "speed-up in total 1.00× " in rows and " 1.50× " in rows
    images = comparison["arms"]["e2e"]["curve"][-1]["probe_images"]
    assert f"±{100 * (0.25 / images) ** 0.5:.1f} points" in rows, "the standard error of one half right"
    manifests = [read_manifest(folder) for folder in sorted((copy / "cache").glob("cut-*"))]
    assert f"Caches on disk, {sum(e.bytes for m in manifests for e in m.shards) / 1e6:,.1f} MB in all" in rows
    for manifest in manifests:
        assert f"{max(error.relative_rmse for error in manifest.errors):.2e}" in rows


def test_nothing_comes_from_outside(whole: Page) -> None:
    text = re.sub("base64,[^\"]*", "base64,", whole.text_of_file)
    assert not re.search(r"https?:|@import|//[a-z]|<script|<link|<iframe|<object|\bon\w+=", text)
    for tag, attributes in whole.tags:
        assert tag != "img" or (attributes["src"] or "").startswith("data:image/png;base64,")
        assert all((attributes.get(name) or "#").startswith("#") for name in ("href", "xlink:href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_what_is_referred_to_is_there(whole: Page) -> None:
    text = whole.text_of_file
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'(?:url\(#|href="#|labelledby=")([^")]+)', text)) <= set(ids)


def test_figures_have_words_and_are_saved(root: Path, whole: Page) -> None:
    found = whole
    drawings = [attributes for tag, attributes in found.tags if tag == "svg"]
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(drawings) == 9 and len(pictures) == 5, "stages 0-2 and two arms predict pixels"
    assert all(one["role"] == "img" and len(one["aria-label"] or "") > 20 for one in drawings)
    assert all(one["alt"] for one in pictures)
    names = ("accuracy-knn", "accuracy-linear", "time-by-arm", "time-by-part", "cuts", "loss-by-head", "effective-rank")
    for name in names:
        assert (root / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    point = json.loads((root / "speedup.json").read_text())["arms"]["cached"]["curve"][1]
    told = next(one["aria-label"] for one in drawings if "frozen, cached" in (one["aria-label"] or ""))
    assert f"{100 * point['knn_top1']:.1f} % at {point['seconds']:.0f} s" in (told or "")
    cuts = next(one["aria-label"] or "" for one in drawings if "all blocks learn" in (one["aria-label"] or ""))
    assert cuts == (
        "epochs 0 to 1: all blocks learn; epochs 1 to 2: blocks 1 to 1 frozen, 1 of them cached; "
        "epochs 2 to 4: blocks 1 to 3 frozen, 3 of them cached"
    )


def test_tables_are_tables(whole: Page) -> None:
    found = whole
    count = {tag: sum(1 for name, _ in found.tags if name == tag) for tag in ("table", "caption", "h1", "main")}
    assert count["table"] == count["caption"] > 10 and count["h1"] == count["main"] == 1
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in found.tags if tag == "th")


def test_runs_that_differ_in_their_seed_only_count_as_seeds(copy: Path) -> None:
    for seed in (1, 2):
        other = shutil.copytree(copy, copy.parent / f"seed-{seed}")
        config = other / "config.toml"
        config.write_text(config.read_text().replace("seed = 0", f"seed = {seed}"))
    other = shutil.copytree(copy, copy.parent / "another-rate")
    (other / "config.toml").write_text((copy / "config.toml").read_text().replace("seed = 0", "seed = 3\n", 1))
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace("batch_size = 16", "batch_size = 8", 1))
    assert len(read_story(RunPaths(copy)).seeds) == 3
    found = page(copy)
    assert "Over 3 seeds" in found.text and "mean of 3 seeds" in found.headline and "One seed" not in found.text
    assert "kNN, cached less e2e stopped early" in found.text and "mean and 95 % interval of 3 seeds" in found.text
    refresh(RunPaths(copy))
    told = json.loads((copy / "speedup.json").read_text())["seeds"]
    same = told["cached_less_early_stop"]["knn_top1"]  # copies of one run: a difference without spread
    assert told["seeds"] == [0, 1, 2] and same["half"] == 0 and same["differences"] == [same["mean"]] * 3
    assert told["arms"]["e2e"]["total_seconds"] == [told["arms"]["e2e"]["total_seconds"][0]] * 3


# --- runs that are not whole ----------------------------------------------------------------------------------------


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"no run in .*; start one with `make all`"):
        write_report(RunPaths(tmp_path / "nothing"))
    assert cli.main(["report", "--run", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "nothing").exists()


def parts_left(root: Path, *gone: str) -> None:
    for name in gone:
        target = root / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def test_stage_0_alone(copy: Path) -> None:
    parts_left(copy, "stage-1", "stage-2", "arms", "cache", "speedup.json", "figures")
    found = page(copy)
    assert found.headline == "Not compared yet: stage 0 done"
    call = f"CONFIG={copy}/config.toml RUN={copy}"
    for command in (f"make stage-1 {call}", f"make stage-2 {call}", f"make e2e {call}", f"make all {call}"):
        assert command in found.text
    assert "Caches on disk" not in found.text and not any(tag == "img" for tag, _ in found.tags)
    assert found.sources["stage-0/stage.json#train_seconds"]


def test_without_arms_the_stages_are_shown(copy: Path) -> None:
    parts_left(copy, "arms", "speedup.json")
    found = page(copy)
    assert found.headline == "Not compared yet: stage 0, stage 1, stage 2 done"
    spent = sum(json.loads((copy / f"stage-{k}" / "stage.json").read_text())["train_seconds"] for k in range(3))
    assert re.search(rf"measure cached training, s {spent:.1f} ", found.text)


def test_an_interrupted_and_a_half_written_run(copy: Path) -> None:
    parts_left(copy, "arms", "speedup.json")
    record = json.loads((copy / "stage-2" / "stage.json").read_text())
    keep = ("stage", "cut", "cache", "cache_seconds", "parent", "inputs", "fingerprint", "epochs")
    running = {key: record[key] for key in keep} | {"status": "running"}
    (copy / "stage-2" / "stage.json").write_text(json.dumps(running))
    with (copy / "events.jsonl").open("a") as file:
        file.write('{"stage": 2, "st')
    found = page(copy)
    assert found.headline == "Not compared yet: stage 0, stage 1 done"
    assert found.sources["stage-2/stage.json#status"] == "running" and "stage 2 (unfinished)" in found.text


def test_a_comparison_of_earlier_stages_is_left_out(copy: Path) -> None:
    record = json.loads((copy / "stage-2" / "stage.json").read_text())
    (copy / "stage-2" / "stage.json").write_text(json.dumps(record | {"state": "another"}))
    found = page(copy)
    assert found.headline.startswith("Not compared: speedup.json is of earlier stages")
    assert not any(source.startswith("speedup.json") for source in found.sources)


def test_a_stage_without_a_cache_is_shown_as_running_its_frozen_blocks(copy: Path) -> None:
    record = json.loads((copy / "stage-2" / "stage.json").read_text())
    (copy / "stage-2" / "stage.json").write_text(json.dumps(record | {"cache": None}))
    found = page(copy)
    assert "At cut 3 the frozen blocks ran forward on every step" in found.text
    assert "; epochs 2 to 4: blocks 1 to 3 frozen, 0 of them cached" in found.text_of_file
    assert stretches(read_story(RunPaths(copy)).stages) == [
        Stretch(0.0, 1.0, 0, 0),
        Stretch(1.0, 1.0, 1, 1),
        Stretch(2.0, 2.0, 3, 0),
    ]


def test_a_stage_that_follows_another_one_is_not_counted(copy: Path) -> None:
    record = json.loads((copy / "stage-1" / "stage.json").read_text())
    (copy / "stage-1" / "stage.json").write_text(json.dumps(record | {"parent": "another"}))
    assert [stage["stage"] for stage in read_story(RunPaths(copy)).stages] == [0]


def test_arms_that_were_scored_on_other_images_are_said_first(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "arms/e2e")
    runner.run_all(job(copy, toy(**{"eval.val_limit": 20})))
    told = capsys.readouterr().out
    why = "arms were scored differently (eval.val_limit 40 or 20): their scores do not compare, no difference is "
    why += "claimed"
    assert told.index(why) < told.index("speed-up") and "less e2e" not in told
    found = json.loads((copy / "speedup.json").read_text())
    assert [len(found["arms"][arm]["scored"]) for arm in ("e2e", "freeze", "cached")] == [2, 1, 1]
    assert found["seeds"]["cached_less_e2e"] == {} == found["seeds"]["cached_less_early_stop"]
    told = page(copy)
    assert told.headline.endswith(f"; {why}") and f"A{why[1:]}." in told.text


def test_what_is_stale_is_said(copy: Path) -> None:
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("views = 2", "views = 1", 1))
    text = page(copy).text
    assert "stage 1 is stale: cache.views: 2 -> 1" in text and "stage 2 is stale" in text


def test_images_that_are_gone(copy: Path) -> None:
    config = copy / "config.toml"
    config.write_text(config.read_text().replace('source = "sample"', 'source = "/no/such/<script>folder"'))
    found = page(copy)
    assert "/no/such/<script>folder" in found.text, "as text"
    assert "how the parts stand" in found.text and "stage.json" not in found.headline


def test_hostile_strings_are_text(copy: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>\"'&"
    for file in (copy / "stage-1" / "stage.json", copy / "arms" / "e2e" / "stage.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"ended": {"why": evil, "epoch": 1}}))
    event = {"time": 1.0, "stage": 2, "step": 999, "loss": 1.0, f"loss_{evil}": 1.0, "warning": evil}
    with (copy / "events.jsonl").open("a") as file:
        file.write(json.dumps(event))
    text = write_report(RunPaths(copy)).read_text()
    assert "<script" not in text and "<img src=x" not in text
    assert page(copy).text.count(evil) >= 2


def test_commands_in_a_warning_are_marked_and_nothing_else_is_html() -> None:
    assert with_commands("<b> `make study NAME=x` `") == "&lt;b&gt; <code>make study NAME=x</code> `"


def test_images_without_labels_have_no_scores(copy: Path) -> None:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: None if key in PROBES else without(item) for key, item in value.items()}
        return [without(item) for item in value] if isinstance(value, list) else value

    for file in (*copy.rglob("stage.json"), copy / "speedup.json"):
        file.write_text(json.dumps(without(json.loads(file.read_text()))))
    found = page(copy)
    assert found.headline.endswith("; the images have no labels, so nobody knows which arm learned more")
    assert found.sources["speedup.json#arms.cached.knn_top1"] == "–"


@pytest.mark.slow
def test_adaptive_finetuned_probed_full_mode_with_a_class_token(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    settings = {"schedule.kind": "adaptive", "schedule.settle_below": 10.0, "schedule.settle_checks": 1}
    settings |= {"model.class_token": True, "mask.groups": 1, "finetune.epochs": 1, "finetune.batch_size": 16}
    settings |= {"eval.probes": ["knn"], "cache.codec": "int8"}
    config = toy(**settings)
    runner.run_finetune(job(root, config, target=0))
    assert page(root).headline == "Not compared yet: stage 0, finetune done"
    runner.run_stage(job(root, config, target=1))
    runner.run_probe(job(root, config, target=0))
    found = page(root)
    assert "Full mode (mask.groups = 1) leaks" in found.text and "int8, blocks of 32" in found.text
    assert "ended early" in found.text and "make all" in found.text
    wrong = {
        source: text for source, text in found.sources.items() if text != expected(source, value_at(root, source))
    }
    assert wrong == {}
    wanted = {"stage-1/stage.json#cut", "finetune/stage.json#heads.0.top1", "probe.json#stage 0.probes.knn.top1"}
    assert wanted <= found.sources.keys()


def test_all_ends_with_the_report_and_report_makes_it_again(copy: Path) -> None:
    before = (copy / "report.html").read_text()
    where = re.search(r"CONFIG=(.*)/config.toml", before)
    assert where, "it names the command for what is missing"
    (copy / "report.html").unlink()
    assert cli.main(["report", "--config", str(copy / "config.toml"), "--run", str(copy)]) == 0
    assert (copy / "report.html").read_text() == before.replace(where[1], str(copy))


def test_steps_that_were_trained_again_count_once() -> None:
    def events(*steps: int) -> Iterator[dict[str, Any]]:
        for number, step in enumerate(steps):
            yield {"stage": 1, "step": step, "loss": float(number)}

    found = step_events(events(10, 20, 30, 20, 30, 40))
    assert [(event["step"], event["loss"]) for event in found["stage-1"]] == [(10, 0), (20, 3), (30, 4), (40, 5)]


def test_a_report_does_not_disturb_the_run(copy: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in copy.rglob("*") if f.is_file() and f.suffix not in (".html", ".png")}
    with RunPaths(copy).lock():
        render(read_story(RunPaths(copy)))
    after = {f: f.stat().st_mtime_ns for f in copy.rglob("*") if f.is_file() and f.suffix not in (".html", ".png")}
    assert {f: t for f, t in after.items() if not f.name.startswith(".lock")} == {
        f: t for f, t in before.items() if not f.name.startswith(".lock")
    }
