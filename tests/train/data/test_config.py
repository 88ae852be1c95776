import json

import pytest

from lora_adapters.train.data.config import load_data_config
from lora_adapters.train.data_error import DataError

SUBSET = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n'


def load(tmp_path, text: str, **arguments):
    file = tmp_path / "data.toml"
    file.write_text(text)
    return load_data_config({"dataset_config": str(file), **arguments})


def test_inner_tables_win_over_outer_ones_and_those_over_the_command_line(tmp_path):
    text = """
    [general]
    keep_tokens = 2
    num_repeats = 2
    batch_size = 2
    [[datasets]]
    keep_tokens = 3
    batch_size = 3
    [[datasets.subsets]]
    image_dir = "a"
    keep_tokens = 4
    [[datasets.subsets]]
    image_dir = "b"
    [[datasets]]
    [[datasets.subsets]]
    image_dir = "c"
    """
    line = {"keep_tokens": 1, "caption_extension": ".txt", "train_batch_size": 9, "resolution": "64,128"}
    first, second = load(tmp_path, text, **line).datasets
    assert [subset.keep_tokens for subset in (*first.subsets, *second.subsets)] == [4, 3, 2]
    assert [subset.num_repeats for subset in (*first.subsets, *second.subsets)] == [2, 2, 2]
    assert {subset.caption_extension for subset in first.subsets} == {".txt"}
    assert (first.batch_size, second.batch_size, first.resolution) == (3, 2, (64, 128))
    assert (first.subsets[0].shuffle_caption, first.subsets[0].caption_separator) == (False, ",")


@pytest.mark.parametrize(
    ("value", "size"), [("512", (512, 512)), ("[512, 768]", (512, 768)), ('"512,768"', (512, 768)), ('"64"', (64, 64))]
)
def test_resolution_spellings(tmp_path, value, size):
    assert load(tmp_path, f"general.resolution = {value}\n{SUBSET}").datasets[0].resolution == size


def test_json_says_the_same_as_toml(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": [{"image_dir": "images"}]}]}))
    as_toml = load(tmp_path, "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images'\n")
    assert load_data_config({"dataset_config": str(file)}).datasets == as_toml.datasets


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_repeats = -1", r"subsets\[0\].num_repeats must be an integer of at least 0, not -1"),
        ("num_repeats = true", "num_repeats must be an integer of at least 0, not true"),
        ('flip_aug = "yes"', 'flip_aug must be true or false, not "yes"'),
        ("token_warmup_step = inf", "token_warmup_step must be a number of at least 0, not Infinity"),
        ("caption_dropout_rate = 2", "caption_dropout_rate must be a number from 0 to 1, not 2"),
        ('resize_interpolation = "sinc"', "resize_interpolation must be one of lanczos, nearest, .*box, not .sinc"),
        ("resolution = 64", r"resolution is not allowed in \[\[datasets.subsets\]\]; it belongs in \[general\] or"),
        ("face_crop_aug_range = [1, 2]", "face_crop_aug_range must be left out .cropping around faces is not supp"),
        ('caption_extension = "."', r'caption_extension must be a file name ending, such as ".txt", not "."'),
        ('caption_extension = "a/txt"', "caption_extension must be a file name ending"),
        ('caption_separator = ""', "caption_separator must not be empty"),
        ('dataset_name = "someone/images"', "has both dataset_name and image_dir"),
        ('split = "test"', "split needs dataset_name, which is not given"),
        ("metadata_file = 3", "metadata_file must be a string, not 3"),
        ('alpha_mask = true\nconditioning_data_dir = "x"', "has two masks"),
    ],
)
def test_subset_errors_name_file_key_and_remedy(tmp_path, line, message):
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, f"general.resolution = 64\n{SUBSET}{line}\n")
    assert str(error.value).startswith(f"{tmp_path / 'data.toml'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[general]\nresolution = 4\n" + SUBSET, "general.resolution must be a size of at least 8"),
        ("[general]\nresolution = [64, 64, 64]\n" + SUBSET, "general.resolution must be a size"),
        ("[general]\nresolution = 100\n" + SUBSET, "resolution 100x100 must be a multiple of 8"),
        (
            "[general]\nnetwork_multiplier = 0.5\nresolution = 64\n" + SUBSET,
            "network_multiplier must be 1.0 or left out",
        ),
        (
            "[general]\nimage_dir = 'x'\n" + SUBSET,
            r"general.image_dir is not allowed in \[general\]; it belongs in \[\[datas",
        ),
        ("[genral]\nresolution = 64\n" + SUBSET, "no resolution"),
        (SUBSET, "no resolution"),
        ("[general]\nresolution = 64\n", "datasets is missing"),
        ("datasets = []", "datasets must be a list of at least one table"),
        ("[[datasets]]\nresolution = 64\n", r"datasets\[0\].subsets is missing"),
        ("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n", "names no images"),
        (
            "general.resolution = 56\ngeneral.enable_bucket = true\n" + SUBSET,
            "bucket_reso_steps 64 is larger than the resol",
        ),
        (
            "general.resolution = 64\ngeneral.enable_bucket = true\ngeneral.bucket_reso_steps = 12\n" + SUBSET,
            "multiple of 8",
        ),
        (
            "general.resolution = 64\ngeneral.enable_bucket = true\ngeneral.min_bucket_reso = 128\n" + SUBSET,
            "min_bucket_reso 128 is larger",
        ),
        ("x = = 1", "line 1"),
        ("datasets = 1" + 400 * "0", "more than 64 bits"),
        ("datasets = 0x" + 5000 * "f", "more than 64 bits"),
    ],
)
def test_file_errors(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none\.toml: No such file"):
        load_data_config({"dataset_config": str(tmp_path / "none.toml")})
    (tmp_path / "latin.toml").write_bytes(b'x = "\xe9"')
    with pytest.raises(DataError, match=r"latin\.toml: not UTF-8 at byte 5; save the file as UTF-8"):
        load_data_config({"dataset_config": str(tmp_path / "latin.toml")})
    (tmp_path / "data.yaml").write_text("")
    with pytest.raises(DataError, match=r"ends in .toml or .json"):
        load_data_config({"dataset_config": str(tmp_path / "data.yaml")})


def test_encodings_and_separators_of_a_file_leave_its_values_alone(tmp_path):
    text = f'[general]\r\nresolution = 64\r\ncaption_prefix = "a\u2028b\x85c"\r\n{SUBSET}'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "data.toml").write_bytes(text.encode(encoding))
        (subset,) = load_data_config({"dataset_config": str(tmp_path / "data.toml")}).datasets[0].subsets
        assert subset.caption_prefix == "a\u2028b\x85c"
    (tmp_path / "data.json").write_bytes(json.dumps({"datasets": []}).encode("utf-8-sig"))
    with pytest.raises(DataError, match="must be a list of at least one table"):
        load_data_config({"dataset_config": str(tmp_path / "data.json")})


@pytest.mark.parametrize("path", [r"C:\Users\me", r"D:\temp\new", r"C:\data"])
def test_backslashes_of_windows_paths_are_explained(tmp_path, path):
    with pytest.raises(DataError, match=r"write the path in single quotes \('C:\\x'\) or with /") as error:
        load(tmp_path, f'general.resolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{path}"\n')
    assert str(error.value).startswith(f"{tmp_path / 'data.toml'}: ")


def test_class_folders_from_the_command_line(tmp_path, caplog):
    for name in ("train/10_sks dog", "train/2_cat", "train/3", "train/4_", "train/notes", "reg/1_dog"):
        (tmp_path / name).mkdir(parents=True)
    folders = {"train_data_dir": str(tmp_path / "train"), "reg_data_dir": str(tmp_path / "reg")}
    config = load_data_config({**folders, "resolution": "64", "flip_aug": True})
    found = [(subset.class_tokens, subset.num_repeats, subset.is_reg) for subset in config.datasets[0].subsets]
    assert found == [("sks dog", 10, False), ("cat", 2, False), ("", 3, False), ("", 4, False), ("dog", 1, True)]
    assert all(subset.flip_aug for subset in config.datasets[0].subsets)
    assert "notes" in caplog.text
    assert config.file is None


def test_caption_extension_is_an_ending_with_or_without_its_dot(tmp_path):
    for ending in ("txt", ".txt"):
        config = load(tmp_path, f'general.resolution = 64\n{SUBSET}caption_extension = "{ending}"\n')
        assert config.datasets[0].subsets[0].caption_extension == ".txt"


def test_metadata_from_the_command_line(tmp_path):
    line = {"train_data_dir": "images", "in_json": "meta.json", "dataset_repeats": 3, "resolution": 64}
    (subset,) = load_data_config(line).datasets[0].subsets
    assert (subset.image_dir, subset.metadata_file, subset.num_repeats) == ("images", "meta.json", 3)


def test_unknown_keys_of_a_file_are_ignored_with_one_warning(tmp_path, caplog):
    text = "[genral]\na = 1\n[general]\nresolution = 64\nshuffle_captions = true\n[[datasets]]\nbatchsize = 2\n"
    config = load(tmp_path, f'{text}[[datasets.subsets]]\nimage_dir = "p"\nnum_repeat = 2\nzzz = 1\n')
    assert config.datasets[0].subsets[0].num_repeats == 1
    (warning,) = caplog.messages
    assert warning == (
        f"{tmp_path / 'data.toml'}: not options of a dataset, and ignored: genral (did you mean general?), "
        "general.shuffle_captions (did you mean shuffle_caption?), datasets[0].batchsize (did you mean batch_size?), "
        "datasets[0].subsets[0].num_repeat (did you mean num_repeats?), datasets[0].subsets[0].zzz"
    )


def test_a_file_wins_over_folders_of_the_command_line(tmp_path, caplog):
    config = load(tmp_path, f"general.resolution = 64\n{SUBSET}", train_data_dir="x", reg_data_dir="y")
    assert [subset.image_dir for subset in config.datasets[0].subsets] == ["images"]
    assert "--train_data_dir, --reg_data_dir: not used, since --dataset_config" in caplog.text


def test_command_line_errors(tmp_path):
    with pytest.raises(DataError, match="nothing to train on: give --dataset_config or --train_data_dir"):
        load_data_config({})
    with pytest.raises(DataError, match=f"--train_data_dir: {tmp_path} has no folder named like 10_name"):
        load_data_config({"train_data_dir": str(tmp_path)})
    with pytest.raises(DataError, match=r"--train_data_dir: .* is not a folder"):
        load_data_config({"train_data_dir": str(tmp_path / "none")})
    with pytest.raises(DataError, match=r'--resolution must be a size of at least 8: .*, not "big"'):
        load(tmp_path, SUBSET, resolution="big")
    with pytest.raises(DataError, match="--train_batch_size must be an integer of at least 1, not 0"):
        load(tmp_path, SUBSET, resolution=64, train_batch_size=0)
