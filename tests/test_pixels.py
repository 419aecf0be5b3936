"""Plain images in every pixel mode: as slides, as crops and as labelled patches they show the same."""
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image
from synthetic import png, prepared, rows_of, saved, tissue, write, write_table

import data
import eval as eval_py
from common.errors import InputError
from data import Crops
from wsi.cache import load_crops, read_crop, ready_cells
from wsi.pixels import is_grey, read_image
from wsi.slides import Slide

COLOR = tissue(64)
GREY = COLOR[..., 1]
DARK = GREY < np.median(GREY)
ALPHA = np.linspace(0, 255, 64 * 64).round().astype(np.uint8).reshape(64, 64)


def png16(path, pixels):
    """Writes a PNG of 16 bits a channel, which Pillow cannot: pixels (H, W) or (H, W, 3), uint16."""
    height, width = pixels.shape[:2]
    color = 2 if pixels.ndim == 3 else 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    write(path, png(width, height, 16, color, rows))


def tiff(path, pixels, **options):
    tifffile.imwrite(path, pixels, **{"photometric": "minisblack"} | options)


def gray_rgb(pixels):
    """Grey px (H, W) as RGB."""
    return np.repeat(pixels[..., None], 3, 2)


def blended(pixels, alpha):
    """The px (H, W, 3) over white, by definition."""
    share = alpha[..., None] / 255
    return pixels * share + 255 * (1 - share)


def tinted_png(path):
    """An RGB PNG with one transparent colour, its tRNS."""
    saved(path, array=COLOR, transparency=tuple(COLOR[3, 5].tolist()))


def palette_png(path):
    """A palette with a transparent entry: the px of column 0 to 31."""
    image = Image.fromarray(np.repeat([[0] * 32 + [1] * 32], 64, 0).astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([10, 20, 30, 200, 100, 150])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, transparency=0)


TINT = np.where((COLOR == COLOR[3, 5]).all(2, keepdims=True), 255, COLOR)
PALETTE = np.where(np.arange(64)[None, :, None] < 32, 255, np.array([200, 100, 150]))
MODES = {  # file: how it is written, what it shows
    "rgb.png": (lambda path: saved(path, array=COLOR), COLOR),
    "grey.png": (lambda path: saved(path, array=GREY), gray_rgb(GREY)),
    "one bit.png": (lambda path: saved(path, array=DARK), gray_rgb(255 * DARK)),
    "alpha.png": (lambda path: saved(path, array=np.dstack([COLOR, ALPHA])), blended(COLOR, ALPHA)),
    "grey alpha.png": (lambda path: saved(path, "LA", np.dstack([gray_rgb(GREY), ALPHA])),
                       blended(gray_rgb(GREY), ALPHA)),
    "grey times alpha.tif": (  # alpha that the px are already multiplied with
        lambda path: tiff(path, np.dstack([GREY // 2, np.full_like(GREY, 128)]), photometric="minisblack",
                          extrasamples=["assocalpha"]),
        blended(gray_rgb(GREY), np.full_like(GREY, 128))),
    "transparent color.png": (tinted_png, TINT),
    "palette.png": (palette_png, np.broadcast_to(PALETTE, (64, 64, 3))),
    "cmyk.tif": (lambda path: saved(path, "CMYK", COLOR), COLOR),
    "grey of 16 bits.png": (lambda path: png16(path, GREY.astype(np.uint16) * 257), gray_rgb(GREY)),
    "grey of 16 bits.tif": (lambda path: tiff(path, GREY.astype(np.uint16) * 257), gray_rgb(GREY)),
    "grey of 16 bits, big-endian.tif": (
        lambda path: tiff(path, GREY.astype(np.uint16) * 257, byteorder=">"), gray_rgb(GREY)),
    "grey of 12 bits in 16.png": (lambda path: png16(path, GREY.astype(np.uint16) * 16), gray_rgb(GREY)),
    "grey of 8 bits in 16.tif": (lambda path: tiff(path, GREY.astype(np.uint16)), gray_rgb(GREY)),
    "grey of 8 bits in 32.tif": (lambda path: tiff(path, GREY.astype(np.int32)), gray_rgb(GREY)),
    "color of 16 bits.png": (lambda path: png16(path, COLOR.astype(np.uint16) * 257), COLOR),
    "color of 16 bits.tif": (
        lambda path: tiff(path, COLOR.astype(np.uint16) * 257, photometric="rgb"), COLOR)}
REFUSED = {  # file: how it is written, what the message says
    "float.tif": (lambda path: tiff(path, GREY.astype(np.float32)), "floating-point"),
    "large.tif": (lambda path: tiff(path, GREY.astype(np.int32) * 1000), "no range of 8 to 16 bits"),
    "below 0.tif": (lambda path: tiff(path, GREY.astype(np.int32) - 300), "no range of 8 to 16 bits"),
    "color of 12 bits.png": (lambda path: png16(path, COLOR.astype(np.uint16) * 16), "at most 14 of its 16"),
    "color of 12 bits.tif": (
        lambda path: tiff(path, COLOR.astype(np.uint16) * 16, photometric="rgb"), "at most 14 of its 16"),
    "planes of 16 bits.tif": (
        lambda path: tiff(path, COLOR.transpose(2, 0, 1).astype(np.uint16) * 257, photometric="rgb",
                          planarconfig="separate"), "separate planes")}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_shows_the_same_as_crop_patch_and_slide(tmp_path, name):
    write, shows = MODES[name]
    write(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).astype(float), shows, atol=1)
    slide = Slide(tmp_path / name, slide_mpp=0.5)
    assert np.array_equal(np.asarray(slide.read_level(0, 0, 0, 64, 64)), np.asarray(image))
    crop = np.asarray(image.resize((224, 224), Image.BICUBIC))
    assert np.array_equal(np.asarray(read_crop(tmp_path / name)[0]), crop)
    assert np.array_equal(load_crops([tmp_path / name], 1)[0][0].permute(1, 2, 0).numpy(), crop)
    assert is_grey(np.asarray(image)) == ("grey" in name or "one bit" in name)


@pytest.mark.parametrize("name", REFUSED)
def test_px_without_a_range_are_refused_with_the_way_out(tmp_path, name):
    write, says = REFUSED[name]
    write(tmp_path / name)
    for read in (read_image, read_crop, lambda path: Slide(path, slide_mpp=0.5)):
        with pytest.raises(InputError, match=says) as error:
            read(tmp_path / name)
        assert name in str(error.value) and "save it as 8-bit RGB" in str(error.value)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation, ending):
    upright = np.zeros((16, 32, 3), np.uint8)  # a bright corner on the left, a half-bright one on the right
    upright[:8, :8] = 255
    upright[:8, 24:] = 128
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: upright.transpose(1, 0, 2)[::-1],
              7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1]}[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"photo.{ending}"
    saved(path, array=np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_allclose(np.asarray(read_image(path)).astype(float), upright, atol=6)
    slide = Slide(path, slide_mpp=0.5)
    assert (slide.width, slide.height) == (32, 16)


def test_damaged_exif_costs_its_own_image(tmp_path):
    entries = struct.pack("<HHIIHHII", 259, 4, 1, 70_000, 0x112, 3, 1, 6)  # Compression is a SHORT
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    saved(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(InputError, match="a.jpg: cannot be read as an image") as error:
        read_image(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)


def test_cells_of_a_slide_of_16_bits_are_those_of_8_bits(place):
    png16(place / "in" / "slides" / "deep.png", tissue().astype(np.uint16) * 257)
    found, failed = prepared()
    assert failed == [] and np.array_equal(ready_cells(found, "deep"), ready_cells(found, "good"))
    assert np.array_equal(*(np.asarray(Crops(found, [name])[0][0]) for name in ("deep", "good")))


# ---------------------------------------------------------------- no colour

def test_a_grey_slide_is_skipped_because_it_has_no_color(place):
    saved(place / "in" / "slides" / "grey.png", "L")
    png16(place / "in" / "slides" / "deep.png", tissue()[..., 1].astype(np.uint16) * 257)
    saved(place / "in" / "slides" / "white.png", array=np.full((300, 300, 3), 244, np.uint8))
    failed = sorted(prepared()[1])
    assert [("no colour" in line, "--tissue" in line) for line in failed] == [
        (True, False), (True, False), (False, True)]


def test_grey_crops_and_patches_are_warned_of(place, capsys):
    rows = []
    for i in range(20):
        png16(place / "c" / "crops" / f"{i}.png", tissue(224, seed=i)[..., 1].astype(np.uint16) * 257)
        patch = tissue(64, seed=i)[..., 1].astype(np.uint16)
        png16(place / "p" / f"{i}.png", patch * (257 if i % 2 else 100))
        rows.append(f"{i}.png,{'ab'[i % 2]},{'test' if i > 13 else 'train'}")
    write_table(place / "p" / "labels.csv", "image,label,split", rows)
    says = "20 of 20 crops have no colour; H&E is needed"
    for _ in range(2):  # also where the cells are kept
        prepared("c")
        assert f"warning: c: {says}" in capsys.readouterr().out
    assert data.main(["check", "--data", "c", "--workers", "1"]) == 1
    assert "warning: c: 20 of 20 crops have no colour (0.png, 1.png, 10.png, ...)" in capsys.readouterr().out
    flags = ["--encoder", "pixels", "--folds", "2", "--workers", "1", "--device", "cpu"]
    assert eval_py.main(["patches", "--data", "p", *flags]) == 0
    assert f"warning: {says}" in capsys.readouterr().out
    accuracy = [row["accuracy"] for row in rows_of(place / "runs" / "p_pixels" / "patches.csv")]
    assert accuracy == ["1.0000"] * 2  # both classes were all white before


# ---------------------------------------------------------------- size

def test_a_plain_slide_obeys_max_gigapixels(tmp_path):
    saved(tmp_path / "a.png")  # 256 x 256 px
    with pytest.raises(InputError, match="256 x 256 px are more than --max-gigapixels 6e-05; raise it"):
        Slide(tmp_path / "a.png", slide_mpp=1.0, gigapixels=6e-5)
    slide = Slide(tmp_path / "a.png", slide_mpp=1.0, gigapixels=7e-5)
    assert np.array_equal(np.asarray(slide.read_level(0, 0, 0, 256, 256)), tissue())


def test_a_tiff_over_pillows_own_limit_is_read(tmp_path):
    Image.new("1", (16_000, 12_000)).save(tmp_path / "large.tif")  # Pillow refuses 179 million px
    assert Slide(tmp_path / "large.tif", slide_mpp=1.0).width == 16_000


@pytest.mark.parametrize("read, size, says", [
    (read_crop, (16_000, 12_000), "16,000 x 12,000 px are more than a crop may have; put it in"),
    (lambda path: Slide(path, slide_mpp=1.0), (10 ** 6, 10 ** 7),
     "1,000,000 x 10,000,000 px take 37253 GiB")])
def test_an_image_that_is_too_large_is_refused_unread(tmp_path, read, size, says):
    path = write(tmp_path / "a.png", png(*size))
    with pytest.raises(InputError, match=says):
        read(path)
