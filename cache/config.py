"""Settings of the feature cache. Free of torch, like every config module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cache.codecs import codec_fields, parse_filter

if TYPE_CHECKING:
    from cache.order import Blocks

Codec = Literal["float16", "bfloat16", "int8"]


@dataclass(frozen=True)
class CacheConfig:
    """How frozen features are kept."""

    backend: Literal["zarr", "webdataset"] = "zarr"
    """Format on disk."""
    codec: Codec = "float16"
    """How a feature is stored: 2 bytes, 2 bytes with the range of float32, or 1 byte and a scale per block."""
    block: int = 32
    """Channels of a token that share one scale; with codec int8 only."""
    filter: str = "none"
    """After the codec: `lz4` or `zstd` (lossless), `bitround-<bits>` (fewer mantissa bits of a float codec, so that
    compression finds more), or `bitround-<bits>+zstd`."""
    later_codec: Literal["", "float16", "bfloat16", "int8"] = ""
    """Codec of the second cut's cache and of all later ones; empty means that of the first."""
    max_error: float = 0.05
    """A build whose measured relative RMSE is larger is refused; one that continues others is also compared with the
    images, on a few samples, before it begins. A finished cache is taken as it is."""
    views: int = 2
    """Augmented views kept of every image; epoch e reads view e mod views."""
    refresh: int = 0
    """A ring of views: after so many epochs of a cached stage its oldest view is replaced by a new one, so that
    augmentation does not stay frozen; 0 keeps the views. Later cuts are then built from images."""
    refresh_ahead: int = 0
    """Turns of the ring whose new view is encoded beside training, on the cluster, before it is needed; so many views
    more lie on disk. What a step reads stays the same. 0 encodes at each turn, while training waits."""
    pixels: Literal["stored", "recut"] = "stored"
    """Where pixel and HOG targets of a cached stage come from: the crop's uint8 pixels, stored beside the features, or
    the original image, cut again by the stored parameters of that crop: less disk, more decoding at every step."""
    memory_mb: int = 1024
    """Memory that reading a cache may take, in MiB: half for the batches ahead of the step, half for mapped files: a
    cache that fits is mapped, which is faster, a larger one is read by position."""
    root: str = ""
    """Folder of the caches, or a URL such as s3://bucket/caches; empty means <run>/cache."""
    shard_rows: int = 256
    """Samples in one shard file; a shard is the unit of building, resuming and repair."""
    encode_batch: int = 0
    """Samples that pass the frozen blocks at once while a cache is built; 0: 64, on a CPU fewer where the model is so
    large that fewer are faster."""
    shuffle: Literal["rows", "blocks"] = "rows"
    """Order of an epoch, in every arm: all rows shuffled, or shards in random order and rows shuffled within windows of
    `shuffle_shards` shards of `shard_rows` rows, so that few files are read at a time."""
    shuffle_shards: int = 16
    """Shards in a window of block shuffling; a window of several batches mixes well."""
    budget_gb: float = 0.0
    """Most that the run's caches may take on disk at the same time, in 10^9 bytes; 0: whatever the disk has."""
    over_budget: Literal["refuse", "live"] = "refuse"
    """What happens when the stages' caches do not fit `budget_gb`: the run is refused before anything starts, or those
    stages whose caches save least run their frozen blocks live, on the views that a cache would hold."""
    keep: Literal["all", "needed"] = "all"
    """Which caches stay: all, or only those that a stage which is still to run reads or continues."""

    @property
    def memory(self) -> int:
        """Bytes for the batches ahead, and the same for mapped files."""
        return self.memory_mb * 2**20 // 2

    @property
    def blocks(self) -> Blocks | None:
        """How the order of an epoch keeps to shards; None where it does not."""
        from cache.order import Blocks  # imports numpy, which reading settings does without

        return Blocks(self.shard_rows, self.shuffle_shards) if self.shuffle == "blocks" else None

    @property
    def order_inputs(self) -> dict[str, Any]:
        """The same as inputs of what is trained in that order."""
        if self.shuffle == "rows":
            return {}
        names = ("shuffle", "shuffle_shards", "shard_rows")
        return {f"cache.{name}": getattr(self, name) for name in names}

    def stored(self, later: bool = False) -> dict[str, Any]:
        """The fields of a FeatureSpec that say how the first cut's features are stored, or those of later ones."""
        codec = (self.later_codec if later else "") or self.codec
        return codec_fields(codec, self.block, parse_filter(self.filter).keepbits)

    def inputs(self, later: bool = False) -> dict[str, Any]:
        """The same as inputs of what is trained on them, without what has no say."""
        return {f"cache.{name}": value for name, value in self.stored(later).items() if value}
