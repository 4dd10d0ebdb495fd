"""What an object store fails to answer: asked again where that helps, counted, bounded, and told in one line. Faults
are made by a proxy in front of a real server."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache import open_cache
from cache.errors import CacheError, DamagedCache
from cache.manifest import ShardEntry, atomic_write, cache_folder_name, find_damage
from cache.patience import CutShort, StoreConfig, patiently, repeated, use_store
from cache.place import StoreUnreachable, holds_secret, is_there, place_of, read_bytes, read_range, remove_tree
from cache.receipts import read_receipt, write_receipt
from cache.users import Cost, read_cost, write_cost
from cache.verify import kept_manifest, verify_cache
from tests.faulty import THROUGH_PROXY, Fault, FaultyStore
from tests.object_store import KEY, SECRET


def counted(before: dict[str, int]) -> dict[str, int]:
    return {kind: number - before.get(kind, 0) for kind, number in repeated().items() if number > before.get(kind, 0)}


def test_what_passes_is_asked_again_after_longer_and_longer_pauses() -> None:
    use_store(StoreConfig(retries=8, wait=0.5))
    pauses: list[float] = []

    def fails() -> None:
        raise CutShort("half of it")

    before = repeated()
    with pytest.raises(CutShort):
        patiently(fails, pauses.append)
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert len(pauses) == 8 and all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    assert counted(before) == {"cut short": 8}


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), OSError(22, "x"), TypeError(), CacheError()])
def test_what_lasts_is_asked_once(error: Exception) -> None:
    asked: list[int] = []

    def fails() -> None:
        asked.append(1)
        raise error

    with pytest.raises(type(error)):
        patiently(fails, lambda pause: pytest.fail("waited"))
    assert asked == [1]


READS = (
    Fault("status"),
    Fault("status", status=500, code="InternalError", message="We encountered an internal error."),
    Fault("status", status=502, code="BadGateway", message="bad gateway"),
    Fault("cut"),
    Fault("short"),
)


def test_faults_of_a_read_that_go_away_are_counted_and_those_that_stay_are_one_line(
    faulty: FaultyStore, tmp_path: Path, example
) -> None:
    wanted = example()
    wanted.build(tmp_path / "cache")  # a folder that the store serves
    place = faulty.store.at(tmp_path / "cache")
    reader = open_cache(place)
    for fault in READS:
        before = repeated()
        faulty.faults = [replace(fault, times=1, inside="features/c/0")]
        np.testing.assert_array_equal(reader.read([0]).features_BLD, wanted.stored_VNLD[0, [0]])
        assert sum(counted(before).values()) == 1
        faulty.faults = [replace(fault, inside="features/c/0")]
        asked = faulty.count("GET", "features/c/0")
        with pytest.raises(StoreUnreachable, match=r"^s3://.* cannot be reached \(.*\); nothing is lost, run") as told:
            reader.read([0])
        assert "\n" not in str(told.value) and faulty.count("GET", "features/c/0") == asked + 2
    faulty.faults = []
    np.testing.assert_array_equal(reader.read([0]).features_BLD, wanted.stored_VNLD[0, [0]])


def test_a_short_manifest_and_a_short_shard_on_their_way_are_no_damage(
    faulty: FaultyStore, tmp_path: Path, example
) -> None:
    wanted = example()
    wanted.build(tmp_path / "cache")  # a folder that the store serves
    place = faulty.store.at(tmp_path / "cache")
    faulty.faults = [Fault("short", times=1, inside="manifest.json"), Fault("cut", times=1, inside="features/c/0")]
    assert verify_cache(place) == [] and all(fault.times == 0 for fault in faulty.faults)


@pytest.mark.parametrize("kind", ["slow", "drip"])
def test_a_slow_answer_is_waited_for_as_long_as_the_setting_says(
    faulty: FaultyStore, tmp_path: Path, kind: str
) -> None:
    """Slow: nothing comes. Drip: a byte comes now and then, which a client's own limit never ends."""
    place = faulty.store.at(tmp_path / "slow" / "object")
    atomic_write(place, b"x" * 200)
    use_store(replace(THROUGH_PROXY, retries=1, timeout=1.0))
    place = faulty.store.at(tmp_path / "slow" / "object")
    assert is_there(place), "a client of this limit is made and connected"
    before, seconds = repeated(), 1.5 if kind == "slow" else 0.02
    faulty.faults = [Fault(kind, times=1, seconds=seconds)]  # type: ignore[arg-type]
    assert read_range(place, 0, 200) == b"x" * 200 and counted(before) == {"too slow": 1}
    faulty.faults = [Fault(kind, seconds=seconds)]  # type: ignore[arg-type]
    started = time.perf_counter()
    with pytest.raises(StoreUnreachable, match=r"cannot be reached \((Read timeout|no answer within 1 s)"):
        read_range(place, 0, 200)
    assert 2 <= time.perf_counter() - started < 4


def test_requests_that_write_list_ask_and_remove_are_made_again_too(faulty: FaultyStore, tmp_path: Path) -> None:
    place = faulty.store.at(tmp_path / "many" / "object")
    before = repeated()
    for fault in (Fault("status", 1, method="PUT"), Fault("status", 1, method="HEAD")):
        faulty.faults = [fault]
        atomic_write(place, b"content")
        assert fault.times == 0
    faulty.faults = [Fault("status", 1, method="HEAD")]
    assert is_there(place) and read_bytes(place) == b"content"
    faulty.faults = [Fault("status", 1, method="POST")]
    remove_tree(place.parent)
    assert not is_there(place) and sum(counted(before).values()) == 4
    faulty.faults = [Fault("status", method="PUT")]
    with pytest.raises(StoreUnreachable, match="cannot be reached"):
        atomic_write(place, b"content")
    faulty.faults = []
    assert not is_there(place), "nothing half written is there"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "InvalidAccessKeyId", f"The key {KEY} does not exist in our records."),
        (400, "ExpiredToken", "The provided token has expired."),
        (403, "SignatureDoesNotMatch", f"The signature of {SECRET} does not match."),
    ],
)
def test_keys_that_are_refused_are_told_once_and_not_repeated_in_words(
    faulty: FaultyStore, tmp_path: Path, status: int, code: str, message: str
) -> None:
    place = faulty.store.at(tmp_path / "refused" / "object")
    atomic_write(place, b"content")
    faulty.faults = [Fault("status", status=status, code=code, message=message)]
    asked = faulty.count("GET")
    with pytest.raises(StoreUnreachable, match=r"is refused .*wrong, have expired, or may not do this") as told:
        read_range(place, 0, 7)
    assert faulty.count("GET") == asked + 1
    assert KEY not in str(told.value) and SECRET not in str(told.value)
    faulty.faults = [Fault("status", method="HEAD", status=status, code=code)]  # an answer without a body
    with pytest.raises(StoreUnreachable, match=r"is refused|expired keys"):
        read_bytes(place)


def test_a_large_file_goes_in_parts_and_a_part_that_fails_is_sent_again(faulty: FaultyStore, tmp_path: Path) -> None:
    use_store(replace(THROUGH_PROXY, part_mb=1 / 64))  # 16 KiB
    content = np.random.default_rng(0).bytes(50_000)
    place = faulty.store.at(tmp_path / "parts" / "object")
    faulty.faults = [Fault("status", times=1, method="PUT", inside="partNumber=2")]
    atomic_write(place, content)
    assert read_bytes(place) == content
    parts = {path.partition("partNumber=")[2][:1] for how, path, _ in faulty.seen if how == "PUT"}
    assert parts == {"1", "2", "3", "4"}, "50,000 bytes are three parts of 16,384 and a rest"
    assert faulty.count("POST", "uploads") == 2 and faulty.count("POST", "uploadId") == 1
    assert faulty.count("DELETE", "uploadId") == 1, "the upload that failed leaves nothing there"
    atomic_write(place.with_name("small"), content[:30_000])
    assert faulty.count("POST") == 3, "what is less than two parts goes whole"


def test_one_request_reads_one_chunk(faulty: FaultyStore, tmp_path: Path, example) -> None:
    wanted = example()
    wanted.build(tmp_path / "cache")  # a folder that the store serves
    place = faulty.store.at(tmp_path / "cache")
    reader = open_cache(place)
    reader.read([0])
    faulty.seen.clear()
    reader.read([2], group=0)
    ranges = [asked for how, path, asked in faulty.seen if how == "GET" and "features" in path]
    first, last = (int(end) for end in ranges[0].removeprefix("bytes=").split("-"))
    group = wanted.layout.spec.num_tokens // wanted.layout.spec.groups
    assert len(ranges) == 1 and last - first + 1 <= 2 * group * wanted.layout.spec.width + 8


def test_an_object_that_is_cut_short_is_told_from_an_answer_that_is(faulty: FaultyStore, tmp_path: Path) -> None:
    place = faulty.store.at(tmp_path / "short" / "object")
    atomic_write(place, b"x" * 100)
    before = repeated()
    for start, end in ((50, 150), (120, 150)):
        with pytest.raises(CacheError, match=f"has 100 bytes and {end} were asked for"):
            read_range(place, start, end)
    assert counted(before) == {} and read_range(place, 40, 40) == b""


def test_a_missing_file_is_missing_and_an_altered_one_altered(faulty: FaultyStore, tmp_path: Path, example) -> None:
    wanted = example()
    wanted.build(tmp_path / "cache")  # a folder that the store serves
    place = faulty.store.at(tmp_path / "cache")
    manifest = open_cache(place).manifest
    entry = next(one for one in manifest.shards if one.rows)
    assert find_damage(place, entry) == ""
    faulty.faults = [Fault("flip", times=1, inside=entry.name)]
    assert find_damage(place, entry) == "is altered"
    (tmp_path / "cache" / entry.name).unlink()
    assert find_damage(place, entry) == "is missing"
    with pytest.raises(DamagedCache):
        open_cache(place, verify=True)


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("s3://bucket/a@b/train-{000..003}.tar", False),
        ("https://host/x.tar?version=3", False),
        ("a/folder?token=x", False),
        ("ftp://someone@host/x", False),
        ("ftp://someone:word@host/x", True),
        ("https://host/x.tar?X-Amz-Signature=ab&X-Amz-Date=1", True),
        ("az://box/x?sv=1&sig=ab", True),
    ],
)
def test_urls_with_secrets_are_known(url: str, secret: bool) -> None:
    assert holds_secret(url) is secret


def test_files_on_a_disk_are_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert read_bytes(place_of("file:" + f"//{tmp_path / 'x'}")) == b"abc"


def test_a_store_that_does_not_answer_has_not_lost_a_receipt_or_a_copy(
    faulty: FaultyStore, tmp_path: Path, example
) -> None:
    """Or it would be built again, and mended, for nothing."""
    layout, place = example().layout, faulty.store.at(tmp_path / "cut")
    write_receipt(place, layout, "view_0-000000000", [ShardEntry("a", 0, 3, 1, "x")])
    write_cost(place, Cost(3.0))
    example().build(finished := faulty.store.at(tmp_path / cache_folder_name(layout.spec)))
    assert read_receipt(place, layout, "view_0-000000000") and kept_manifest(finished) and read_cost(place) == Cost(3.0)
    faulty.faults = [Fault("status")]
    with pytest.raises(StoreUnreachable, match="cannot be reached"):
        read_receipt(place, layout, "view_0-000000000")
    with pytest.raises(StoreUnreachable, match="cannot be reached"):
        kept_manifest(finished)
    with pytest.raises(StoreUnreachable, match="cannot be reached"):
        read_cost(place)
    faulty.faults = []
    assert read_receipt(place, layout, "nothing") is None and kept_manifest(place) is None
    assert read_cost(tmp_path / "nothing") is None
