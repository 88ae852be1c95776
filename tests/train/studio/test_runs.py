"""A page's settings as a training, and what a run's folder says."""

import json
import os

import pytest

from lora_adapters.train.data.config import load_data_config
from lora_adapters.train.options.arguments import parse
from lora_adapters.train.studio import runs
from lora_adapters.train.studio.paths import Folders, StudioError
from lora_adapters.train.studio.runs import Recipe
from tests.train.conftest import draw_images


@pytest.fixture
def folders(tmp_path):
    draw_images(tmp_path / "images" / "shapes")
    (tmp_path / "output").mkdir()
    return Folders("a model", tmp_path / "output", (), (tmp_path / "images",))


@pytest.fixture
def recipe(folders):
    return Recipe("mine", str(folders.images[0] / "shapes"), rank=4, alpha=2, resolution=64, batch=2, steps=10)


def read(words):
    assert words[0] == "train"
    return parse(words[1:])


def test_the_words_are_the_trainers(folders, recipe):
    words, run = runs.prepared(recipe, folders)
    settings = read(words)
    assert run == folders.output / "mine"
    assert (settings.pretrained_model_name_or_path, settings.output_dir) == ("a model", str(run))
    assert (settings.network_module, settings.network_dim, settings.network_alpha) == ("lierla", 4, 2)
    assert (settings.max_train_steps, settings.learning_rate, settings.seed) == (10, 1e-4, 0)
    assert settings.save_every_n_steps is settings.sample_prompts is settings.network_args is None
    assert runs.load(run) == recipe


def test_settings_of_runs_before_the_field_was_renamed_are_read(folders, recipe):
    _, run = runs.prepared(recipe, folders)
    settings = json.loads((run / runs.SETTINGS).read_text())
    settings["pictures"] = settings.pop("images")
    (run / runs.SETTINGS).write_text(json.dumps(settings))
    assert runs.load(run) == recipe


def test_every_setting_reaches_the_trainer(folders, recipe):
    full = runs.recipe_of(
        {**vars(recipe), "type": "DyLoRA", "conv_rank": 8, "unit": 2, "precision": "bf16", "checkpointing": True,
         "cache_latents": False, "save_every": 5, "sample_every": 3, "prompts": "a cat --w 64\na dog", "seed": 9,
         "held_out": 0.25, "repeats": 3, "class_tokens": 'a "shape"', "learning_rate": 0.5, "name": "other"},
        list(vars(recipe)),
    )  # fmt: skip
    words, run = runs.prepared(full, folders)
    settings = read(words)
    assert settings.network_module == "dylora"
    assert settings.network_args == ["unit=2", "conv_dim=8", "conv_alpha=2"]
    assert (settings.mixed_precision, settings.gradient_checkpointing, settings.cache_latents) == ("bf16", True, False)
    assert (settings.save_every_n_steps, settings.sample_every_n_steps, settings.seed) == (5, 3, 9)
    assert settings.learning_rate == 0.5
    assert (run / runs.PROMPTS).read_text() == "a cat --w 64\na dog\n"
    (dataset,) = load_data_config(vars(settings)).datasets
    (subset,) = dataset.subsets
    assert (dataset.resolution, dataset.batch_size, dataset.validation_split) == ((64, 64), 2, 0.25)
    assert (subset.image_dir, subset.num_repeats) == (full.images, 3)
    assert (subset.class_tokens, subset.caption_extension) == ('a "shape"', ".txt")


def test_a_dry_run_leaves_no_run(folders, recipe):
    words, run = runs.dry(recipe, folders)
    assert read(words).dry_run
    assert run.is_relative_to(folders.private)
    assert runs.runs(folders) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../x"}, "is not a file name"),
        ({"name": " "}, "give the adapter a name"),
        ({"images": "/etc"}, "outside of the folders"),
        ({"type": "--x"}, "is not an adapter type"),
        ({"precision": "fp8"}, "is not a precision"),
        ({"rank": None}, "rank is empty"),
        ({"steps": 2.5}, "steps is a whole number"),
    ],
)
def test_what_cannot_be_trained_is_said(folders, recipe, changes, said):
    with pytest.raises(StudioError, match=said):
        runs.prepared(runs.recipe_of({**vars(recipe), **changes}, list(vars(recipe))), folders)
    assert runs.runs(folders) == []


def test_a_run_goes_on_from_its_furthest_state(folders, recipe):
    _, run = runs.prepared(recipe, folders)
    with pytest.raises(StudioError, match="has no saved state"):
        runs.resumed("mine", 20, folders)
    for name, step in (("mine-step00000004", 4), ("mine", 10)):
        state = run / f"{name}-state"
        state.mkdir()
        (state / "train_state.json").write_text(json.dumps({"current_step": step}))
    (run / "broken-state").mkdir()
    (run / "broken-state" / "train_state.json").write_text("{")
    settings = read(runs.resumed("mine", 20, folders)[0])
    assert settings.resume == str(run / "mine-state")
    assert settings.max_train_steps == 20
    assert runs.load(run).steps == 20
    with pytest.raises(StudioError, match="has already trained 10 steps"):
        runs.resumed("mine", 10, folders)
    with pytest.raises(StudioError, match="there is no run"):
        runs.resumed("../mine", 20, folders)


LOG = (
    "\rcaching latents: 100%|█████| 19/19 [00:00<00:00, 21.59it/s]\n"
    "\rtraining:   0%|          | 0/10 [00:00<?, ?step/s]\r"
    "step 0: held-out loss validation 0.41645\n"
    "\rtraining:  10%|█         | 1/10 [00:03<00:35,  3.98s/step, epoch=1, loss=0.4293, lr=1.00e-03]"
    "\rtraining:  20%|██        | 2/10 [00:04<00:18,  2.33s/step, epoch=1, loss=0.2470, lr=1.00e-03]\r     \r"
    "step 2: held-out loss validation_rank4 0.40000, validation_rank8 0.30000\n"
    "\rtraining:  20%|██        | 2/10 [00:04<00:18,  2.33s/step, epoch=1, loss=0.2000, lr=1.00e-03]\n"
)


def test_losses_are_read_from_what_the_trainer_prints():
    assert runs.losses(LOG) == [
        (1, 0.4293, "training"),
        (2, 0.2, "training"),
        (0, 0.41645, "held out"),
        (2, 0.4, "held out, rank 4"),
        (2, 0.3, "held out, rank 8"),
    ]
    bar = "\rtraining:  1%|  | {0}/5000 [00:03<00:35,  3.98s/step, epoch=1, loss=0.5, lr=1.00e-03]"
    many = runs.losses("".join(bar.format(step) for step in range(1, 5001)))
    assert len(many) <= 401
    assert [many[0][0], many[-1][0]] == [1, 5000]


def test_the_trainer_prints_what_is_read(basics, capfd):
    """The real program's output, so that a change of its bar or its lines is found here."""
    from lora_adapters.train.options.arguments import settings
    from lora_adapters.train.training.loop import train_prepared
    from lora_adapters.train.training.setup import prepare

    basics |= {"max_train_steps": 3, "validation_split": 0.25}
    run = prepare(settings(**basics))
    losses = train_prepared(run).losses
    read = runs.losses(capfd.readouterr().err.replace("\n", "\r") + "\n")
    shown = {step: loss for step, loss, which in read if which == "training"}
    assert 3 in shown  # tqdm leaves out steps that follow too fast on one another, and never the last one
    for step, loss in shown.items():
        epoch = losses[max(0, step - run.steps_per_epoch) : step]
        assert loss == pytest.approx(sum(epoch) / len(epoch), abs=1e-4)


def test_the_newest_report_of_a_run_is_shown_in_a_frame_without_scripts(folders):
    pytest.importorskip("gradio")
    from lora_adapters.train.studio.page import framed

    run = folders.output / "mine"
    run.mkdir()
    assert runs.report(run) is None
    assert "no report yet" in framed(None)
    (run / "old-report.html").write_text("old")
    os.utime(run / "old-report.html", (1, 1))
    (run / "mine-report.html").write_text('<p title="a">é</p><script>bad()</script>', encoding="utf-8")
    (run / "link-report.html").symlink_to(folders.images[0])
    report = runs.report(run)
    assert report == run / "mine-report.html"
    page = framed(report)
    assert '<iframe sandbox srcdoc="&lt;p title=&quot;a&quot;&gt;é&lt;/p&gt;&lt;script&gt;' in page
    assert "<script" not in page
