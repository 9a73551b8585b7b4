"""Reading masks: nothing that Pillow or uint8 does to the numbers gets through."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from interp.datasets.masks import Coding, check_sizes, read_mask, read_picture
from interp.errors import DataWrong
from interp.labels import IGNORE

NUMBERS = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 2, 0]])


def png(numbers: np.ndarray, bits: int, color_type: int = 0) -> bytes:
    """A PNG of greys (or indices) of 1 to 16 bits, written by hand: Pillow writes no such greys."""
    height, width = numbers.shape
    rows = b""
    for row in numbers:
        digits = "".join(f"{v:0{bits}b}" for v in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + bytes(int(digits[k : k + 8], 2) for k in range(0, len(digits), 8))

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    table = chunk(b"PLTE", bytes(range(0, 48))) if color_type == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + table
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_greys_of_any_depth(bits):
    numbers = NUMBERS % 2**bits
    raw = read_mask(png(numbers, bits), "a.png")
    assert raw.dtype == np.int64
    assert np.array_equal(raw, numbers)
    top = np.full((2, 3), 2**bits - 1)
    assert np.array_equal(read_mask(png(top, bits), "a.png"), top)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_any_depth_are_indices(bits):
    numbers = NUMBERS % 2**bits
    assert np.array_equal(read_mask(png(numbers, bits, color_type=3), "a.png"), numbers)


def test_sixteen_bits_and_tiff(tmp_path):
    numbers = np.array([[0, 300], [65535, 7]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(numbers).save(tmp_path / name)
        assert np.array_equal(read_mask(tmp_path / name, name), numbers)
    Image.fromarray(numbers.astype(np.int32)).save(tmp_path / "b.tif")
    assert np.array_equal(read_mask(tmp_path / "b.tif", "b.tif"), numbers)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_colours_are_refused_and_told_why(mode, tmp_path):
    file = tmp_path / "a.tif"
    Image.new(mode, (4, 3)).save(file)
    with pytest.raises(DataWrong, match=rf"a\.tif.*mode {mode}.*saved through RGB"):
        read_mask(file, "a.tif")


def test_lossy_masks_are_refused(tmp_path):
    Image.fromarray(NUMBERS.astype(np.uint8)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(DataWrong, match=r"a\.png is a JPEG.*PNG"):
        read_mask(tmp_path / "a.png", "a.png")


def test_files_that_are_no_pictures(tmp_path):
    whole = png(NUMBERS, 8)
    for content in (b"", b"not a picture", whole[: len(whole) // 2]):
        for read in (read_mask, read_picture):
            with pytest.raises(DataWrong, match=r"x\.png cannot be read"):
                read(content, "x.png")
    with pytest.raises(DataWrong, match=r"x\.png cannot be read"):
        read_picture(tmp_path / "absent.png", "x.png")


def test_pictures_become_rgb_and_are_not_turned():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    file = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    image = read_picture(file.getvalue(), "a.png")
    assert np.array_equal(np.asarray(image), pixels)
    file = BytesIO()
    Image.fromarray(pixels[..., 0]).save(file, "PNG")
    assert read_picture(file.getvalue(), "a.png").mode == "RGB"


def test_the_shift_by_one_at_the_borders_of_uint8():
    coding = Coding.plain(254, reduce_zero_label=True)
    raw = np.array([[0, 1, 254, 255]], np.uint8)
    assert coding.decode(raw, "a.png").tolist() == [[IGNORE, 0, 253, IGNORE]]
    assert coding.decode(raw, "a.png").dtype == np.int64
    wide = Coding.plain(3, ignore=65535)
    assert wide.decode(np.array([[2, 65535]], np.uint16), "a").tolist() == [[2, IGNORE]]


def test_what_is_ignored_wins_over_a_class():
    coding = Coding.plain(3, ignore=(0, 9))
    assert coding.decode(np.array([[0, 1, 2, 9]]), "a").tolist() == [[IGNORE, 1, 2, IGNORE]]
    assert coding.allowed() == "0..2 and 9"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([[0, 3, 1, 1]], r"m\.png holds 3 \(25\.0%.*0\.\.2 and 255"),
        ([[0, 1, 2, 254]], r"holds 254"),
        ([[-1, 0, 0, 0]], r"holds -1"),
        ([[300, 256, 1, 1]], r"holds 256, 300 \(50\.0%"),
        ([list(range(100, 110))], r"100, 101, 102, 103, 104 and 5 more values"),
    ],
)
def test_numbers_that_mean_nothing(raw, words):
    with pytest.raises(DataWrong, match=words + ".*do this"):
        Coding.plain(3, hint="do this").decode(np.array(raw), "m.png")
    assert Coding.plain(3).wrong_values(np.array(raw)).tolist() == sorted(
        {v for v in raw[0] if v not in (0, 1, 2, 255)}
    )


def test_ignore_must_fit_a_mask():
    for value in (-1, 65536):
        with pytest.raises(DataWrong, match=rf"ignore={value}"):
            Coding.plain(3, ignore=value)


def test_sizes_that_differ():
    image = Image.new("RGB", (20, 10))
    check_sizes(image, np.zeros((10, 20)), "a.jpg", "a.png")
    with pytest.raises(DataWrong, match=r"a\.jpg is 20 x 10.*a\.png is 20 x 11") as told:
        check_sizes(image, np.zeros((11, 20)), "a.jpg", "a.png")
    assert "EXIF" not in str(told.value)
    with pytest.raises(DataWrong, match="EXIF"):
        check_sizes(image, np.zeros((20, 10)), "a.jpg", "a.png")
