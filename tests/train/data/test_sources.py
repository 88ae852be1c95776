import json

import datasets
import pytest

from lora_adapters.train.data.config import SubsetConfig
from lora_adapters.train.data.image_files import open_image
from lora_adapters.train.data.sources import load_subset
from lora_adapters.train.data_error import DataError
from tests.train.drawn import drawn_image, folder


def load(path, **options):
    return load_subset(SubsetConfig(image_dir=str(path), **options))


def test_captions_come_from_files_then_from_the_class(tmp_path, caplog):
    images = folder(tmp_path / "p", [(32, 16), (16, 32), (8, 8)])
    (images / "0.txt").write_text("﻿  a wide one \nsecond line\n\n", encoding="utf-8")
    (images / "2.txt").write_text("")
    found = load(images, caption_extension=".txt", class_tokens="sks")
    assert [(one.caption, one.size) for one in found.images] == [
        ("a wide one", (32, 16)),
        ("sks", (16, 32)),
        ("", (8, 8)),
    ]
    assert found.without_caption == 1
    assert '1 images have no caption; the class "sks" is used' in caplog.text
    assert load(images, caption_extension=".txt", enable_wildcard=True).images[0].caption == "a wide one\nsecond line"


def test_unreadable_images_are_left_out_by_count_and_name(tmp_path, caplog):
    images = folder(tmp_path / "p", [(16, 16)] * 4)
    (images / "1.png").write_bytes(b"")
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:100])
    found = load(images)
    assert [one.source.name for one in found.images] == [str(images / "0.png"), str(images / "2.png")]
    assert len(found.skipped) == 2
    assert f"2 images cannot be read and are left out: {images / '1.png'} (empty file)" in caplog.text
    for path in images.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 4 images can be read \(the first: .*0.png: empty file"):
        load(images)


def test_folders_and_captions_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"image_dir .*none does not exist"):
        load(tmp_path / "none")
    with pytest.raises(DataError, match="p: no images found"):
        load(folder(tmp_path / "p", []))
    images = folder(tmp_path / "q", [(8, 8)])
    (images / "0.caption").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"0\.caption: not UTF-8 at byte 3; save the file as UTF-8"):
        load(images)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_of_any_encoding_are_cut_at_line_ends_only(tmp_path, encoding):
    images = folder(tmp_path / "p", [(8, 8)])
    first = "a\u2028cat\x85on\x0ba\x0cmat"
    (images / "0.caption").write_bytes(f"{first}\r\nsecond\rthird".encode(encoding))
    assert load(images).images[0].caption == first
    assert load(images, enable_wildcard=True).images[0].caption == f"{first}\nsecond\nthird"
    for kind, text in (
        ("json", json.dumps({"0.png": {"caption": first}}, ensure_ascii=False)),
        ("jsonl", "\r\n" + json.dumps({"image_path": "0.png", "caption": first}, ensure_ascii=False)),
    ):
        file = tmp_path / f"meta.{kind}"
        file.write_bytes(text.encode(encoding))
        assert load(images, metadata_file=str(file)).images[0].caption == first


def test_caption_files_of_another_ending_are_pointed_out(tmp_path, caplog):
    images = folder(tmp_path / "p", [(8, 8)] * 3)
    for name in ("0.txt", "1.txt", "2.tags"):
        (images / name).write_text("a")
    load(images)
    assert "3 images have no caption; an empty caption is used; 2 of them have a .txt file beside them: " in caplog.text
    assert 'did you mean caption_extension = ".txt" instead of ".caption"?' in caplog.text
    caplog.clear()
    load(folder(tmp_path / "q", [(8, 8)]))
    assert "1 images have no caption; an empty caption is used" in caplog.text
    assert "beside" not in caplog.text


def test_cache_info_spares_opening_images_and_notices_changes(tmp_path, monkeypatch):
    images = folder(tmp_path / "p", [(16, 16), (24, 16)], ["a", "b"])
    first = load(images, cache_info=True)
    table = json.loads((images / "metadata_cache.json").read_text())
    assert table[str(images / "1.png")] | {"modified": 0} == {"caption": "b", "resolution": [24, 16], "modified": 0}
    opened = []
    measure = __import__("lora_adapters.train.data.sources", fromlist=["x"]).size_if_whole
    monkeypatch.setattr(
        "lora_adapters.train.data.sources.size_if_whole", lambda one: opened.append(one.name) or measure(one)
    )
    assert load(images, cache_info=True).images == first.images
    assert opened == []
    drawn_image((40, 16)).save(images / "0.png")
    assert load(images, cache_info=True).images[0].size == (40, 16)
    assert opened == [str(images / "0.png")]
    (images / "metadata_cache.json").write_text("{")
    assert len(load(images, cache_info=True).images) == 2


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_metadata_files(tmp_path, kind):
    images = folder(tmp_path / "p", [(16, 16)] * 6)
    entries = {
        "0.png": {"caption": "one", "tags": "x, y", "image_size": [1, 1]},
        str(images / "1.png"): {"tags": "only tags"},
        "2": {"caption": "no suffix"},
        "3.png": {},
        "gone.png": {"caption": "not there"},
        "4.png": {"caption": "", "tags": "a\nb"},
        "5.png": {"caption": "one\r\ntwo", "tags": "c"},
    }
    file = tmp_path / f"meta.{kind}"
    lines = [json.dumps({"image_path": path, **entry}) for path, entry in entries.items()]
    file.write_text(json.dumps(entries) if kind == "json" else "\n".join(lines) + "\n")
    found = load(images, metadata_file=str(file))
    assert [one.caption for one in found.images] == [
        "one,x, y",
        "only tags",
        "no suffix",
        "",
        "a,b",
        "one,c\ntwo,c",
    ]
    assert {one.size for one in found.images} == {(16, 16)}
    assert [name for name, _ in found.skipped] == [str(images / "gone.png")]


def test_metadata_paths_may_be_relative_to_the_working_folder(tmp_path, monkeypatch):
    folder(tmp_path / "a", [(16, 16)])
    (tmp_path / "m.json").write_text('{"a/0.png": {"caption": "one"}}')
    monkeypatch.chdir(tmp_path)
    assert [one.caption for one in load("a", metadata_file="m.json").images] == ["one"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "{", "m.json: Expecting"),
        ("m.json", "[]", "must be an object with an object for each image path"),
        ("m.json", '{"0.png": {"caption": 3}}', "0.png: caption must be a string"),
        ("m.json", json.dumps({"9" * 5000: {"caption": "a"}}), "9: File name too long"),
        ("m.jsonl", '{"image_path": "0.png"}\n{}', "line 2 must be a table with image_path"),
        ("m.csv", "", "must end in .json or .jsonl"),
    ],
)
def test_metadata_errors(tmp_path, name, text, message):
    images = folder(tmp_path / "p", [(16, 16)])
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load(images, metadata_file=str(tmp_path / name))
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        load(images, metadata_file=str(tmp_path / "none.json"))


def test_masks_belong_to_images_by_name(tmp_path):
    images = folder(tmp_path / "p", [(16, 16)] * 2)
    masks = folder(tmp_path / "m", [(16, 16)], suffix=".jpg")
    with pytest.raises(DataError, match=r"has no mask for .*1\.png"):
        load(images, conditioning_data_dir=str(masks))
    folder(tmp_path / "m", [(16, 16)] * 2)
    assert load(images, conditioning_data_dir=str(masks)).images[1].mask == str(masks / "1.png")
    with pytest.raises(DataError, match=r"conditioning_data_dir .* is not a folder"):
        load(images, conditioning_data_dir=str(tmp_path / "none"))


def hub(name, **options):
    return load_subset(SubsetConfig(dataset_name=str(name), **options))


def test_a_local_folder_of_images_as_a_hugging_face_dataset(tmp_path):
    images = folder(tmp_path / "p", [(24, 16), (16, 16)])
    rows = [("0.png", "a wide one", "x"), ("1.png", "a square", "y")]
    lines = [json.dumps({"file_name": file, "text": text, "other": other}) for file, text, other in rows]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    found = hub(images)
    assert [(one.caption, one.size) for one in found.images] == [("a wide one", (24, 16)), ("a square", (16, 16))]
    assert open_image(found.images[0].source).tobytes() == drawn_image((24, 16), 0).tobytes()
    assert [one.caption for one in hub(images, caption_column="other").images] == ["x", "y"]
    with pytest.raises(DataError, match="has no caption_column title; its columns are image, text, other"):
        hub(images, caption_column="title")
    with pytest.raises(DataError, match="has no image_column photo"):
        hub(images, image_column="photo")
    with pytest.raises(DataError, match="Unknown split"):
        hub(images, split="test")


def test_a_configuration_of_a_hugging_face_dataset(tmp_path):
    for name, size in (("small", (16, 8)), ("large", (32, 8))):
        folder(tmp_path / "p" / name, [size])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.png\n" for name in ("small", "large"))
    (tmp_path / "p" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, size in (("small", (16, 8)), ("large", (32, 8))):
        assert [one.size for one in hub(tmp_path / "p", dataset_config_name=name).images] == [size]


def test_a_folder_with_configurations_is_read_as_it_is_now(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "README.md").write_text("---\nconfigs:\n- config_name: all\n  data_files: small/*.png\n---\n")
    for count in (1, 2):
        folder(tmp_path / "p" / "small", [(16, 8)] * count)
        assert len(hub(tmp_path / "p", dataset_config_name="all").images) == count


def test_a_saved_dataset_with_several_captions_and_empty_rows(tmp_path, caplog):
    rows = {"image": [drawn_image((16, 8)), None], "captions": [["a", "b\r\nc\u2028d"], ["c"]]}
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "saved"))
    found = hub(tmp_path / "saved", caption_column="captions", cache_dir=str(tmp_path / "cache"))
    assert [one.caption for one in found.images] == ["a\nb\nc\u2028d"]
    assert found.images[0].cache_stem.startswith(str(tmp_path / "cache" / "train-"))
    assert "row 1 (the row has no image)" in caplog.text
    with pytest.raises(DataError, match="has no split test"):
        hub(tmp_path / "saved", split="test")


def test_class_labels_are_captions_by_name(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({"image": [drawn_image((8, 8))] * 2, "kind": [1, 0]}, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    assert [one.caption for one in hub(tmp_path / "saved", caption_column="kind").images] == ["dog", "cat"]
