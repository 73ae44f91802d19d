"""Token sources and the order in which they are read."""

from geon.data.bins import open_bins
from geon.data.codec import ByteCodec, Codec, load_codec
from geon.data.corpus import Corpus, Split, stdlib_corpus
from geon.data.endless import StreamBatches
from geon.data.glyphs import glyph_corpus
from geon.data.images import ImageBatches, ImageSplit, cifar_corpus
from geon.data.loader import Loader
from geon.data.mix import MixedBatches, mixed_corpus
from geon.data.order import Batches, sample_index
from geon.data.shards import write_bin
from geon.data.synthetic import synthetic_corpus
from geon.data.text import text_corpus

__all__ = [
    "Batches",
    "ByteCodec",
    "Codec",
    "Corpus",
    "ImageBatches",
    "ImageSplit",
    "Loader",
    "MixedBatches",
    "Split",
    "StreamBatches",
    "cifar_corpus",
    "glyph_corpus",
    "load_codec",
    "mixed_corpus",
    "open_bins",
    "sample_index",
    "stdlib_corpus",
    "synthetic_corpus",
    "text_corpus",
    "write_bin",
]
