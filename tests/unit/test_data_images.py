"""Images as data: arrays, class folders, columns of paths or bytes, and every way to be wrong."""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prunepeft.data import load_data, load_rows
from prunepeft.data.arrays import to_netpbm
from prunepeft.data.images import decode_image
from prunepeft.data.sources import _hub_table
from prunepeft.errors import ConfigError, DataError, MissingExtraError
from tests.data_files import jsonl
from tests.image_files import bars, save_classes, save_npz, save_png

GREY = np.array([[0, 50, 100], [150, 200, 250]], dtype=np.uint8)


def png(image=GREY):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def split_lengths(splits):
    return [len(part) for part in (splits.train, splits.validation)]


# --- forms ----------------------------------------------------------------------------------


def test_arrays_in_a_folder_of_splits(tmp_path):
    train, validation = bars(12), bars(4)
    splits = load_data(save_npz(tmp_path / "d", train=train, validation=validation))
    assert (splits.task, splits.columns) == ("image-cls", {"image": "image", "label": "label"})
    assert (splits.labels, split_lengths(splits)) == (("0", "1"), [12, 4])
    images = [decode_image(value, 1, "here")[..., 0] for value in splits.train["image"]]
    assert np.array_equal(images, train["images"])
    assert list(splits.train["label"]) == train["labels"].tolist()


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_one_file_of_arrays_is_split_by_seed(tmp_path, channels):
    folder = save_npz(tmp_path, train=bars(20, channels=channels))
    splits = load_data(f"{folder}/train.npz")
    assert split_lengths(splits) == [18, 2]
    assert decode_image(splits.train["image"][0], channels or 1, "here").shape == (
        8,
        8,
        channels or 1,
    )


def test_class_folders_are_split_by_seed(tmp_path):
    splits = load_data(save_classes(tmp_path / "d"))
    assert (splits.task, splits.labels) == ("image-cls", ("lying", "upright"))
    assert split_lengths(splits) == [18, 2]
    for row in splits.train:
        assert Path(row["image"]).parent.name == splits.labels[row["label"]]


def test_class_folders_in_folders_of_splits(tmp_path):
    save_classes(tmp_path / "d" / "train", 12)
    save_classes(tmp_path / "d" / "val", 4)
    (tmp_path / "d" / "train" / "lying" / "notes.txt").write_text("x")
    (tmp_path / "d" / "about").mkdir()
    splits = load_data(str(tmp_path / "d"))
    assert split_lengths(splits) == [12, 4]
    assert "1 files of the class folders are no images and are left out" in splits.notes
    assert "4 validation rows have the same image as a train row" in splits.notes


def test_a_class_may_be_called_train(tmp_path):
    splits = load_data(save_classes(tmp_path / "d", names=("bus", "train")))
    assert splits.labels == ("bus", "train")


def test_columns_of_paths_count_from_the_file(tmp_path, monkeypatch):
    save_classes(tmp_path / "d" / "images")
    rows = [
        {"file_name": f"images/{name}/{i}.png", "label": name}
        for i, name in enumerate(["upright", "lying"] * 10)
    ]
    (tmp_path / "d" / "train.jsonl").write_text(jsonl(rows))
    monkeypatch.chdir(tmp_path)
    splits = load_data("d/train.jsonl")
    assert (splits.task, splits.columns["image"]) == ("image-cls", "file_name")
    assert all(Path(path).is_absolute() for path in splits.train["file_name"])
    assert load_data("d").columns == splits.columns  # data files come before class folders


@pytest.mark.parametrize("form", ["bytes", "struct", "mixed"])
def test_parquet_with_bytes(tmp_path, form):
    path = save_png(tmp_path / "a.png", GREY)
    values = {"bytes": [png()], "struct": [{"bytes": png(), "path": "a"}]}
    values["mixed"] = [{"bytes": png(), "path": None}, {"bytes": None, "path": path}]
    rows = [{"img": values[form][i % len(values[form])], "label": i // 2 % 2} for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    splits = load_data(str(tmp_path / "d.parquet"))
    assert (splits.task, splits.columns["image"]) == ("image-cls", "img")
    assert np.array_equal(decode_image(splits.train["img"][0], 1, "here")[..., 0], GREY)


def test_a_hub_data_set_keeps_its_images_and_names():
    import datasets

    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {"img": [Image.fromarray(GREY)] * 2, "label": [0, 1]}
    hub = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table = _hub_table(hub, "owner/name train")
    assert table.label_names == ("a", "b")
    assert np.array_equal(decode_image(table.rows[0]["img"]["bytes"], 1, "here")[..., 0], GREY)


def test_a_text_column_comes_first(tmp_path):
    rows = [{"text": f"t{i}", "image": "a.png", "label": i % 2} for i in range(12)]
    (tmp_path / "d.jsonl").write_text(jsonl(rows))
    assert load_data(str(tmp_path / "d.jsonl")).task == "seq-cls"


def test_other_data_gets_the_same_labels(tmp_path):
    like = load_data(save_classes(tmp_path / "d"))
    rows = load_rows(save_classes(tmp_path / "e", 4), like=like)
    assert sorted(rows["label"]) == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"'cat' .* none of the classes to train on \(lying"):
        load_rows(save_classes(tmp_path / "f", 4, ("cat", "lying")), like=like)


def test_the_fingerprint_is_of_the_pixels_not_the_place(tmp_path):
    one, moved = (load_data(save_classes(tmp_path / name)) for name in "ab")
    save_png(tmp_path / "b" / "lying" / "1.png", GREY)
    assert one.fingerprint == moved.fingerprint != load_data(str(tmp_path / "b")).fingerprint


# --- pixels ---------------------------------------------------------------------------------


def test_arrays_become_files_that_are_read_back():
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(decode_image(to_netpbm(colours), 3, ""), colours)
    assert np.array_equal(decode_image(to_netpbm(GREY), 1, "")[..., 0], GREY)
    assert np.array_equal(decode_image(to_netpbm(GREY.T), 1, "")[..., 0], GREY.T)


def test_grey_is_repeated_and_colours_are_weighed():
    assert np.array_equal(decode_image(png(), 3, ""), np.repeat(GREY[..., None], 3, axis=2))
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    assert decode_image(png(primaries), 1, "").ravel().tolist() == [76, 150, 29]


def test_transparency_is_dropped_and_photos_are_turned():
    clear = np.array([[[9, 8, 7, 0]]], dtype=np.uint8)
    assert decode_image(png(clear), 3, "").tolist() == [[[9, 8, 7]]]
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(GREY).save(file, "PNG", exif=exif)
    assert np.array_equal(decode_image(file.getvalue(), 1, "")[..., 0], np.rot90(GREY, -1))


# --- wrong ----------------------------------------------------------------------------------

GOOD = bars(12)
WRONG_ARRAYS = {
    "no images": ({"labels": GOOD["labels"]}, r"no array 'images' \(arrays: labels\)"),
    "no labels": ({"images": GOOD["images"], "y": GOOD["labels"]}, "no array 'labels'"),
    "float": (GOOD | {"images": GOOD["images"] / 255.0}, "images are float64; allowed is uint8"),
    "int": (GOOD | {"images": GOOD["images"].astype(np.int64)}, "images are int64"),
    "flat": (GOOD | {"images": GOOD["images"].reshape(12, -1)}, r"have the shape \(12, 64\)"),
    "channels first": (GOOD | {"images": np.zeros((12, 3, 8, 8), np.uint8)}, "channels, last"),
    "four channels": (GOOD | {"images": np.zeros((12, 8, 8, 4), np.uint8)}, "1 or 3 channels"),
    "no pixels": (GOOD | {"images": np.zeros((12, 0, 8), np.uint8)}, r"shape \(12, 0, 8\)"),
    "no rows": ({"images": GOOD["images"][:0], "labels": GOOD["labels"][:0]}, "has no rows"),
    "label float": (GOOD | {"labels": GOOD["labels"] / 2}, "labels are float64; .*whole numbers"),
    "label text": (GOOD | {"labels": GOOD["labels"].astype(str)}, "labels are <U21"),
    "labels short": (GOOD | {"labels": GOOD["labels"][1:]}, r"shape \(11,\), but there are 12"),
    "one hot": (GOOD | {"labels": np.eye(12, dtype=int)}, r"shape \(12, 12\)"),
    "negative": (GOOD | {"labels": GOOD["labels"] - 1}, "row 1: label -1 .*out of range"),
    "one class": (GOOD | {"labels": GOOD["labels"] * 0}, "all 12 rows have the label 0"),
    "pickled": (GOOD | {"images": np.array([{}] * 12)}, "of plain arrays .*allow_pickle"),
}


@pytest.mark.parametrize(("arrays", "message"), WRONG_ARRAYS.values(), ids=WRONG_ARRAYS)
def test_wrong_arrays(tmp_path, arrays, message):
    folder = save_npz(tmp_path, train=arrays)
    with pytest.raises(DataError, match=f"(?s)train.npz.*{message}"):
        load_data(f"{folder}/train.npz")


def test_a_file_that_is_no_npz(tmp_path):
    np.save(tmp_path / "one.npy", GOOD["images"])
    contents = (b"hello", b"PK\x03\x04broken", (tmp_path / "one.npy").read_bytes())
    for content in contents:
        (tmp_path / "train.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"not a readable .npz file of plain arrays"):
            load_data(str(tmp_path / "train.npz"))


def test_a_validation_label_that_is_not_trained(tmp_path):
    folder = save_npz(tmp_path, train=GOOD, validation=GOOD | {"labels": GOOD["labels"] + 1})
    with pytest.raises(DataError, match=r"validation.npz, row 2: label 2 of the validation split"):
        load_data(folder)


WRONG_VALUES = {
    "no file": ("none.png", r"row 1, column 'image': there is no image file .*none.png"),
    "no image": ("text.png", r"the image .*text.png cannot be read"),
    "cut header": (png()[:20], "row 1, column 'image': the image cannot be read"),
    "deep": ("deep.png", "more than 8 bits a channel"),
    "empty": ("", "the path or the bytes of an image file are needed, received ''"),
    "null": (None, "received no value"),
}


@pytest.mark.parametrize(("value", "message"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values(tmp_path, value, message):
    (tmp_path / "text.png").write_text("no image at all")
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "deep.png")
    save_png(tmp_path / "good.png", GREY)
    good = png() if isinstance(value, bytes) else "good.png"
    rows = [{"image": good if i else value, "label": i % 2} for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=f"(?s)d.parquet.*{message}"):
        load_data(str(tmp_path / "d.parquet"))


def test_a_number_is_no_image(tmp_path):
    (tmp_path / "d.jsonl").write_text(jsonl([{"image": 3, "label": i % 2} for i in range(9)]))
    with pytest.raises(DataError, match=r"line 1, column 'image': the path or the bytes .*3"):
        load_data(str(tmp_path / "d.jsonl"))


def test_an_image_that_ends_too_early(tmp_path):
    path = Path(save_png(tmp_path / "a.png", np.zeros((64, 64), np.uint8)))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"image 3: the image .*a.png cannot be read"):
        decode_image(str(path), 1, "image 3")


def test_wrong_folders(tmp_path):
    save_classes(tmp_path / "one" / "valid")
    with pytest.raises(DataError, match=r"has images for validation but none to train on"):
        load_data(str(tmp_path / "one"))
    for name in ("train", "val", "dev"):
        save_classes(tmp_path / "two" / name)
    with pytest.raises(DataError, match=r"several folders of .* could be the validation split"):
        load_data(str(tmp_path / "two"))
    save_png(tmp_path / "flat" / "a.png", GREY)
    with pytest.raises(DataError, match=r"without a train split .*one folder per class"):
        load_data(str(tmp_path / "flat"))
    save_png(tmp_path / "single" / "cat" / "a.png", GREY)
    with pytest.raises(DataError, match=r"all 1 rows have the label 'cat'"):
        load_data(str(tmp_path / "single"))


def test_columns_that_do_not_make_the_task(tmp_path):
    rows = [{"image": save_png(tmp_path / "a.png", GREY), "kind": i % 2} for i in range(9)]
    (tmp_path / "d.jsonl").write_text(jsonl(rows))
    with pytest.raises(DataError, match=r"no column for the label .*task image-cls needs one"):
        load_data(str(tmp_path / "d.jsonl"))
    named = {"label": "kind"}
    assert load_data(str(tmp_path / "d.jsonl"), columns=named).task == "image-cls"
    with pytest.raises(ConfigError, match="task image-cls does not use the role 'text'"):
        load_data(str(tmp_path / "d.jsonl"), columns=named | {"text": "image"}, task="image-cls")
    (tmp_path / "t.jsonl").write_text(jsonl([{"text": "a", "label": i % 2} for i in range(9)]))
    with pytest.raises(DataError, match=r"no column for the image .*columns=\{'image'"):
        load_data(str(tmp_path / "t.jsonl"), task="image-cls")


def test_without_pillow_the_install_line_is_named(tmp_path, monkeypatch):
    folder = save_npz(tmp_path, train=GOOD)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'prunepeft\[vision\]'"):
        load_data(f"{folder}/train.npz")
