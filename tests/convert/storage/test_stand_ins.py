"""Pickles with numpy's numbers and arrays, and with the notes of training programs, whose code is not run."""

import argparse
import collections
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_adapters.convert import Adapter, AdapterError
from lora_adapters.convert.storage.files import read_tensors

NAME = "lora_unet_mid_block_attentions_0_proj_in"
DOWN, UP = torch.randn(2, 6), torch.randn(5, 2)


def pair(alpha=3.0, down=DOWN, up=UP):
    return {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up, f"{NAME}.alpha": alpha}


TABLES = {
    "a number of numpy": lambda: pair(np.float64(3)),
    "a narrow number of numpy": lambda: pair(np.float16(3)),
    "a whole number of numpy": lambda: pair(np.int64(3)),
    "an array without dimensions": lambda: pair(np.array(3.0)),
    "an array of one number": lambda: pair(np.array([3])),
    "a tensor of one whole number": lambda: pair(torch.tensor([3])),
    "bfloat16": lambda: pair(torch.tensor(3, dtype=torch.bfloat16)),
    "arrays": lambda: pair(3, DOWN.numpy(), UP.numpy()),
    "an array by columns": lambda: pair(3, np.asfortranarray(DOWN.numpy()), UP.numpy()),
    "a number of numpy beside it": lambda: {**pair(), "epoch": np.int64(3)},
    "tables in tables": lambda: {"model": {"lora": pair()}, "step": 3},
    "an optimizer beside it": lambda: {"lora": pair(), "optimizer": {"state": {0: {"exp_avg": UP}}}},
    "a table with a default": lambda: collections.defaultdict(dict, pair()),
    "a checkpoint of Lightning": lambda: {
        "epoch": 1,
        "state_dict": pair(),
        "callbacks": {"ModelCheckpoint": {"best_model_path": Path("a"), "best_model_score": np.float32(1)}},
        "hyper_parameters": {"args": argparse.Namespace(lr=1)},
    },
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("table", TABLES)
def test_weights_are_read(table, is_zip, tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save(TABLES[table](), file, _use_new_zipfile_serialization=is_zip)
    (change,) = Adapter.load(file).modules.values()
    torch.testing.assert_close(change.delta(), 1.5 * UP @ DOWN)


def test_arrays_of_every_dtype(tmp_path):
    arrays = {str(kind): np.arange(6).reshape(2, 3).astype(kind) for kind in ("f2", "f4", "f8", "i1", "i8", "u1", "?")}
    torch.save({**arrays, "none": np.zeros((0, 2), np.float32)}, tmp_path / "a.pt")
    tensors = read_tensors(tmp_path / "a.pt")[0]
    assert tensors["none"].shape == (0, 2)
    for name, array in arrays.items():
        assert torch.equal(tensors[name], torch.from_numpy(array))


class Command:
    """An object whose reading would run a command."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (lambda: pair(np.array([3], dtype=object)), "alpha is an object of a training program"),
        (
            lambda: pair(np.float32(3), np.array([[1, 2]], dtype=">f4")),
            "lora_down.weight is an object of a training program",
        ),
        (lambda: pair(argparse.Namespace(a=1)), "alpha is an object of a training program, not a tensor"),
        (lambda: pair(Command()), "cannot be read as plain weights"),
        (lambda: {**pair(), "args": {"lr": Command()}}, "cannot be read as plain weights"),
    ],
)
def test_the_rest_is_one_line(table, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(table(), "a.pt")
    with pytest.raises(AdapterError, match=said) as caught:
        Adapter.load("a.pt")
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_a_table_in_itself(tmp_path):
    table = {}
    table["table"] = table
    torch.save(table, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="table is of the type dict, not a tensor"):
        read_tensors(tmp_path / "a.pt")
