"""How the sample was cut: the first 200 training and 50 validation images of each class, in the order of the tars.

usage: python data/sample/cut.py FOLDER   (with train-*.tar and val-*.tar of CIFAR-10 as <key>.png and <key>.cls)
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent


def first_of_each_class(tars: list[Path], per_class: int) -> list[tuple[str, bytes, bytes]]:
    """(key, png, cls) of the first `per_class` samples of each class."""
    taken: Counter[bytes] = Counter()
    found = []
    for path in tars:
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for key in dict.fromkeys(name.partition(".")[0] for name in files):
            label = files[f"{key}.cls"].strip()
            if taken[label] < per_class:
                taken[label] += 1
                found.append((key, files[f"{key}.png"], label))
    return found


def write(path: Path, samples: list[tuple[str, bytes, bytes]]) -> None:
    """One tar, the same bytes every time."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label in samples:
            for name, content in ((f"{key}.cls", label), (f"{key}.png", image)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main(folder: Path) -> None:
    train = first_of_each_class(sorted(folder.glob("train-*.tar")), 200)
    for part in range(2):
        write(HERE / f"train-{part:06d}.tar", train[part * 1000 : (part + 1) * 1000])
    write(HERE / "val-000000.tar", first_of_each_class(sorted(folder.glob("val-*.tar")), 50))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
