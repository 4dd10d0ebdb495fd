"""Which images a study may see, and how its table calls those that it was evaluated on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.grid import read_study
from pipeline.reading import parse, to_toml
from pipeline.recipes import recipe
from pipeline.study_table import facts


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--data-val", "val.tar"], "DATA_VAL = val.tar; leave it out"),
        (["--set", "data.val_source=val.tar"], "data.val_source = val.tar; leave it out"),
        (["--config", "{config}"], "data.val_source = val.tar; leave it out"),
        (["--data", "sample"], "the evaluation images of data.source = sample; name other images with DATA"),
        (["--set", "data.source=sample"], "the evaluation images of data.source = sample; name other images with DATA"),
    ],
)
def test_a_study_that_chooses_sees_no_evaluation_images(tmp_path: Path, words: list[str], what: str) -> None:
    (tmp_path / "config.toml").write_text(to_toml(parse({"data.val_source": "val.tar"}, recipe("sample"))))
    words = [word.format(config=tmp_path / "config.toml") for word in words]
    with pytest.raises(ConfigError) as found:
        read_study(["plans", "--run", str(tmp_path), *words])
    assert str(found.value).startswith(f"study plans chooses settings, so it may not see {what}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "sample, evaluated on the sample's own evaluation images"),
        (["--data", "images"], "images, evaluated on a tenth that is held back"),
        (["--data", "images", "--data-val", "far/val.tar"], "images, evaluated on val.tar"),
        (["--set", "data.val_source=far/val.tar"], "sample, evaluated on far/val.tar"),
    ],
)
def test_the_table_says_what_it_was_evaluated_on(tmp_path: Path, words: list[str], told: str) -> None:
    assert f"- data: {told}" in facts(read_study(["seeds", "--run", str(tmp_path), *words]))
