from bytejepa.benchmark.codec import bench_codec, compare
from bytejepa.data.corpus import embedded_text
from codec.models import golden_model
from small_models import small_config


def test_every_compressor_of_the_comparison_gets_the_same_text() -> None:
    text = embedded_text("val")[:2000]
    (row,) = compare(golden_model(), {"address": text})
    assert row["num_bytes"] == 2000
    assert set(row["bpb"]) == {"bytejepa", "gzip -9", "zstd -19", "xz -9e", "brotli -11", "bzip2 -9", "PPMd H -o6"}
    assert row["bpb"]["bytejepa"] < row["bpb"]["xz -9e"]


def test_speed_is_measured_for_every_window_and_number_of_lanes() -> None:
    report = bench_codec(small_config(), num_bytes=40, lanes=(1, 2), windows=(16, 32), threads=1)
    rows = [(row["what"], row["window"], row["lanes"]) for row in report["codec"]]
    expected = [
        (what, window, lanes)
        for window in (16, 32)
        for what, lanes in (("encode", 1), ("decode", 1), ("decode", 2), ("float32 steps", 1), ("float32 steps", 2))
    ]
    assert rows == expected
    assert all(row["bytes_per_s"] > 0 for row in report["codec"])
