import io
import json
import os
import pickle
import socket
import struct
from functools import partial

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from localvit.data import images
from localvit.data.config import DataConfig, DataError, Preprocessing
from localvit.data.images import MAX_ASPECT, Part, UnreadableImage, decode, decode_pixels, plain
from localvit.data.loading import eval_loader
from localvit.data.sources import find_splits
from localvit.data.splits import open_splits, open_test_split
from tests.data.conftest import plain_image, png, write_tar


def gray(sample):
    image, label = sample
    return np.asarray(image.convert("RGB"))[0, 0, 0].item(), label


def test_tar_is_right_in_forked_workers_after_a_peek_in_the_parent(make_tar):
    path = make_tar("images.tar", {"a": 100, "b": 100})
    images = open_test_split(str(path), DataConfig())
    assert gray(images[0]) == (0, 0)  # the peek that breaks a reader with a shared file position
    loader = DataLoader(images, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [gray(sample) for sample in loader] == [(i, i // 100) for i in range(200)]


def test_folder_and_tar_agree(make_folder, make_tar):
    classes = {"class10": 3, "class9": 2}
    folder = open_test_split(str(make_folder("images", classes)), DataConfig())
    tar = open_test_split(str(make_tar("images.tar", classes)), DataConfig())
    assert folder.class_names == tar.class_names == ("class9", "class10")  # natural order
    assert [gray(s) for s in folder] == [gray(s) for s in tar] == [(3, 0), (4, 0), (0, 1), (1, 1), (2, 1)]


def test_unreadable_image_is_named(make_folder):
    folder = make_folder("images", {"a": 2, "b": 2})
    bad = folder / "a" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    images = open_test_split(str(folder), DataConfig())
    with pytest.raises(UnreadableImage, match=str(bad)):
        images[1]


def test_unreadable_image_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImage("x.png", "broken")))
    assert (error.name, error.reason) == ("x.png", "broken")


def test_tar_without_images_or_compressed_is_refused(tmp_path, make_tar):
    with pytest.raises(DataError, match="contains 0 images"):
        open_test_split(str(make_tar("empty.tar", {})), DataConfig())
    (tmp_path / "not.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match="not an uncompressed tar"):
        open_test_split(str(tmp_path / "not.tar"), DataConfig())


def test_labels_follow_the_given_classes(make_folder):
    images = open_test_split(str(make_folder("images", {"b": 1, "c": 2})), DataConfig())
    part = Part(images.images, np.array([2, 0]), ("a", "b", "c"))
    assert [label for _, label in part] == part.labels.tolist() == [2, 1]
    with pytest.raises(DataError, match="class 'c' is not among"):
        Part(images.images, images.indices, ("a", "b"))


def test_torchvision_data_set_through_timm(tmp_path):
    # CIFAR-10 as torchvision lays it out, with two images a file; its own integrity check is by checksum.
    from torchvision.datasets import FakeData

    from localvit.data.images import TorchvisionImages

    dataset = FakeData(size=6, image_size=(3, 4, 4), num_classes=3)
    dataset.targets = [0, 1, 2, 0, 1, 2]
    images = TorchvisionImages(dataset, "torch/fake")
    assert images.class_names == ("0", "1", "2")
    assert images[4][1] == 1
    assert len(Part(images, np.arange(6), images.class_names)) == 6


def test_torch_source_needs_a_root_and_says_how_to_download(tmp_path):
    with pytest.raises(DataError, match=r"data\.root"):
        find_splits("torch/cifar10", DataConfig())["train"]()
    with pytest.raises(DataError, match=r"data\.download=true"):
        find_splits("torch/cifar10", DataConfig(root=str(tmp_path)))["train"]()
    assert list(tmp_path.iterdir()) == []


def test_unknown_source_names_what_is_accepted():
    with pytest.raises(DataError, match=r"'nowhere' does not exist; accepted: 'digits', an image folder"):
        find_splits("nowhere", DataConfig())


@pytest.fixture
def shards(tmp_path):
    """Two shards of five images for training, one for validation; the class is the parity."""
    for name, values in (("train-0", range(5)), ("train-1", range(5, 10)), ("val-0", range(10, 14))):
        pairs = [(f"{v:04d}", png(v), str(v % 2).encode()) for v in values]
        members = [m for key, image, label in pairs for m in ((f"{key}.png", image), (f"{key}.cls", label))]
        write_tar(tmp_path / f"{name}.tar", *members)
    return tmp_path


def test_webdataset_shards_are_read_by_index(shards):
    config = DataConfig(
        train="wds/images", root=str(shards), train_split="train-{0..1}.tar|10", test_split="val-0.tar"
    )
    splits = open_splits(config)
    assert sorted(gray(s) for part in (splits.train, splits.validation) for s in part) == [
        (i, i % 2) for i in range(10)
    ]
    assert [gray(s) for s in splits.test] == [(i, i % 2) for i in range(10, 14)]


def test_webdataset_splits_by_name(shards):
    info = {"splits": {"train": {"filenames": ["train-0.tar"]}, "validation": {"filenames": ["val-0.tar"]}}}
    (shards / "_info.json").write_text(json.dumps(info))
    splits = open_splits(DataConfig(train="wds/images", root=str(shards)))
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (5, 4)
    with pytest.raises(DataError, match="has no split 'dev'; use one of train, validation"):
        open_splits(DataConfig(train="wds/images", root=str(shards), test_split="dev"))


def test_webdataset_errors(shards, make_tar):
    with pytest.raises(DataError, match=r"data\.root=None"):
        open_splits(DataConfig(train="wds/images"))
    with pytest.raises(DataError, match="name shards"):
        open_splits(DataConfig(train="wds/images", root=str(shards)))
    with pytest.raises(DataError, match=r"train-2\.tar"):
        open_splits(DataConfig(train="wds/images", root=str(shards), train_split="train-{0..2}.tar"))
    make_tar("train-3.tar", {"a": 1})
    with pytest.raises(DataError, match=r"'a/0\.png' in .* has no \.cls file"):
        open_splits(DataConfig(train="wds/images", root=str(shards), train_split="train-3.tar"))


def colours(mode, side=6):
    """An image of every mode, random but the same each time."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)
    if mode == "1":
        return Image.fromarray(values[..., 0]).convert("1")
    if mode == "P":
        return Image.fromarray(values[..., 0]).convert("P")
    return Image.frombytes(mode, (side, side), values.tobytes())


def stored(image, form, **options):
    """The image as it comes back from a file."""
    data = io.BytesIO()
    image.save(data, form, **options)
    data.seek(0)
    return decode(data, "file")


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("1", "PNG", {}),
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("P", "PNG", {"transparency": bytes(range(0, 250, 2))}),
        ("RGB", "PNG", {"transparency": (1, 2, 3)}),
        ("RGBA", "PNG", {}),
        ("RGB", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("CMYK", "TIFF", {}),
        ("LAB", "TIFF", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of the reference, not of ours
def test_images_of_8_bits_look_as_pillow_converts_them_without_a_warning(mode, form, options):
    data = io.BytesIO()
    colours(mode).save(data, form, **options)
    reference = Image.open(data)
    reference.load()
    found = stored(colours(mode), form, **options)
    assert found.mode == ("L" if mode in ("1", "L", "LA") else "RGB")
    assert np.array_equal(found.convert("RGB"), reference.convert("RGB"))
    if mode != "LAB":  # which Pillow itself converts to RGB only
        assert np.array_equal(found.convert("L"), reference.convert("L"))


def test_no_palette_with_transparency_warns():
    stored(colours("P"), "PNG", transparency=bytes(range(0, 250, 2))).convert("RGB")  # warnings are errors


def test_colour_below_full_transparency_shows():
    image = Image.new("RGBA", (2, 2), (200, 10, 30, 0))
    assert stored(image, "PNG").getpixel((0, 0)) == (200, 10, 30)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])  # Pillow opens the last one with 32 bits
def test_gray_of_16_bits_keeps_its_shades(form):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(stored(Image.fromarray(values), form)).tolist() == [[0, 0, 1, 1, 128, 255]]
    same = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(stored(Image.fromarray(same * 257), form), same)


def test_floating_point_is_unreadable():
    with pytest.raises(UnreadableImage, match="cannot read image 'file': floating-point pixels"):
        stored(Image.new("F", (2, 2), 0.5), "TIFF")


def test_an_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert stored(Image.new("RGB", (8, 4)), "JPEG", exif=exif).size == (8, 4)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [plain_image(value, side=16) for value in (250, 5)]
    found = stored(frames[0], form, save_all=True, append_images=frames[1:])
    assert np.asarray(found.convert("L")).min() > 240


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (99, 1)])
def test_small_and_longish_images_are_left_as_they_are(size):
    assert plain(Image.new("L", size)).size == size


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 5001)])
def test_of_a_very_long_image_the_middle_is_kept(size):
    long = np.arange(max(size), dtype=np.uint16)
    values = np.broadcast_to(long[:, None] if size[1] > size[0] else long[None], size[::-1])
    found = np.asarray(plain(Image.fromarray((values % 251).astype(np.uint8))))
    kept = MAX_ASPECT * min(size)
    assert sorted(found.shape) == sorted((kept, min(size)))
    start = (max(size) - kept) // 2
    expected = (long[start : start + kept] % 251).astype(np.uint8)
    assert np.array_equal(found.max(axis=found.shape.index(min(size))), expected)


def test_the_middle_is_all_that_a_centre_crop_sees():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (4 * 152, 4, 3), dtype=np.uint8))
    assert plain(image).size == (4, 400)
    transform = create_transform((3, 16, 16), crop_pct=0.875, interpolation="bicubic")
    assert np.array_equal(transform(plain(image)), transform(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_odd_images_go_through_a_loader(tmp_path, channels):
    for name, image in {"pixel": Image.new("P", (1, 1)), "line": Image.new("RGBA", (1, 5000))}.items():
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "0.png")
    half = (0.5,) * channels
    preprocessing = Preprocessing(
        input_size=(channels, 8, 8),
        mean=half,
        std=half,
        interpolation="bicubic",
        crop_pct=0.9,
        crop_mode="center",
    )
    images = open_test_split(str(tmp_path), DataConfig())
    (batch,) = eval_loader(images, preprocessing, batch_size=4)
    assert batch.images.shape == (2, channels, 8, 8)


def damaged():
    """Bytes that are no image, each with what is said about them."""
    data = io.BytesIO()
    colours("RGB", side=40).save(data, "JPEG")
    avif = io.BytesIO()
    colours("RGB", side=40).save(avif, "AVIF")
    start = avif.getvalue().find(b"mdat") + 8
    broken = avif.getvalue()[:start] + bytes(len(avif.getvalue()) - start)
    return {
        "empty": (b"", "unknown format; accepted: JPEG, .*TGA"),
        "text": (b"What you see is not what you get.\n", "unknown format; accepted: JPEG, .*TGA"),
        "truncated": (data.getvalue()[:-200], "truncated"),
        "avif": (broken, "decode"),
    }


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "avif"])
def test_what_is_no_image_is_named(kind):
    data, reason = damaged()[kind]
    with pytest.raises(UnreadableImage, match=f"cannot read image 'x.jpg': .*{reason}"):
        decode(io.BytesIO(data), "x.jpg")


@pytest.mark.parametrize(
    ("magic", "size", "reason"),
    [
        (b"P5", (20000, 20000), r"Image size \(400000000 pixels\) exceeds limit"),
        (
            b"P6",
            (9460, 9460),
            "9460 x 9460 pixels are not accepted; save the image with at most 89,478,485 pixels",
        ),
        (b"P6", (60000, 1492), "60000 x 1492 pixels are not accepted"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_named_before_memory_is_taken(magic, size, reason):
    header = b"%s %d %d 255\n" % (magic, *size)  # none of the pixels is there
    for read in (decode, lambda file, name: decode_pixels(file.read(), name, "RGB")):
        with pytest.raises(UnreadableImage, match=rf"x\.pgm': {reason}"):
            read(io.BytesIO(header), "x.pgm")


@pytest.mark.parametrize(
    ("mode", "side"), [("RGB", 10), ("L", 10), ("P", 10), ("RGBA", 7), ("LA", 7), ("CMYK", 7)]
)
def test_images_that_exist_twice_while_they_are_converted_may_have_half_the_pixels(monkeypatch, mode, side):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    form = "TIFF" if mode == "CMYK" else "PNG"
    assert stored(Image.new(mode, (side, side)), form).size == (side, side)
    with pytest.raises(UnreadableImage, match="pixels are not accepted"):
        stored(Image.new(mode, (side + 1, side)), form)


def test_a_file_that_is_too_large_is_not_read(make_folder, monkeypatch):
    """A sparse file takes no place on the disk, and all memory."""
    folder = make_folder("images", {"a": 2})
    os.truncate(folder / "a" / "1.png", 1 << 40)
    with pytest.raises(
        UnreadableImage, match=r"1\.png': the file is larger than 256 MiB; save it as a smaller"
    ):
        open_test_split(str(folder), DataConfig()).read_pixels(1, "RGB")


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # names of sockets are short
        server.bind(path.name)


@pytest.mark.parametrize(
    "make",
    [
        make_pipe,
        make_socket,
        os.mkdir,
        *(partial(os.symlink, device) for device in ("/dev/zero", "/dev/tty", "/dev")),
    ],
)
def test_what_is_no_regular_file_is_not_opened(make_folder, monkeypatch, make):
    monkeypatch.chdir(".")
    folder = make_folder("images", {"a": 2})
    found = open_test_split(str(folder), DataConfig())
    path = folder / "a" / "1.png"
    path.unlink()
    make(path)
    for read in (lambda: decode(str(path), str(path)), lambda: found[1], lambda: found.read_pixels(1, "RGB")):
        with pytest.raises(UnreadableImage, match=r"1\.png': it is not a regular file"):
            read()


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA"])
def test_formats_that_are_read(form):
    options = {"save_all": True, "append_images": [plain_image(9)]} if form == "MPO" else {}
    found = stored(plain_image(200, side=16), form, **options)
    assert abs(np.asarray(found.convert("L")).astype(int) - 200).max() <= 2


def gray_tiff(bits, values, white_is_zero=False, kind=1):
    """An uncompressed gray TIFF of 16 x 16 samples; `kind` is 1 for unsigned, 2 for signed."""
    if bits == 12:
        pairs = zip(values[::2], values[1::2], strict=True)
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    else:
        data = np.array(values).astype(f"<{'iu'[kind == 1]}{bits // 8}").tobytes()
    size, photometric = len(data), 0 if white_is_zero else 1
    fields = [
        (256, 16),
        (257, 16),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 134),
        (277, 1),
        (278, 16),
    ]
    fields += [(279, size), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, v) for tag, v in fields)
    return io.BytesIO(b"II*\0" + struct.pack("<IH", 8, 10) + entries + bytes(4) + data)


@pytest.mark.parametrize(("bits", "white"), [(8, False), (8, True), (12, False), (16, False), (16, True)])
def test_gray_tiff_is_scaled_by_its_own_bits_and_never_a_negative(bits, white):
    top = 2**bits - 1
    values = [round(top * i / 255) for i in range(256)]
    found = np.asarray(decode(gray_tiff(bits, values, white), "x.tif")).ravel().tolist()
    assert found == (list(range(255, -1, -1)) if white else list(range(256)))


@pytest.mark.parametrize(("bits", "kind"), [(8, 2), (16, 2), (32, 2), (32, 1)])
@pytest.mark.parametrize("top", [255, 100])
def test_integers_without_a_range_are_refused(bits, kind, top):
    values = [min(i, top, 2 ** (bits - 1) - 1) for i in range(256)]
    with pytest.raises(
        UnreadableImage, match=r"x\.tif': (signed|32-bit) pixels .* range is unknown; save the"
    ):
        decode(gray_tiff(bits, values, kind=kind), "x.tif")


def test_deep_pixels_beyond_16_bits_of_other_readers_are_refused():
    with pytest.raises(ValueError, match="values from -1 to 70000 are not accepted; use 0 to 65535"):
        plain(Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)))
