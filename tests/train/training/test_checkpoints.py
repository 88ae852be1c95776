import pytest
import torch

from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.checkpoints import (
    Position,
    epoch_name,
    final_name,
    load_state,
    prune_epochs,
    prune_steps,
    save_state,
    step_name,
)


def test_names() -> None:
    named, unnamed = settings(output_name="x"), settings()
    assert [step_name(named, 12), epoch_name(named, 3), final_name(named)] == ["x-step00000012", "x-000003", "x"]
    names = [step_name(unnamed, 12), epoch_name(unnamed, 3), final_name(unnamed)]
    assert names == ["at-step00000012", "epoch-000003", "last"]


@pytest.fixture
def folder(tmp_path):
    """Saves of steps 10 to 50 and epochs 1 to 5, with states, a final save, and another run's files."""
    for step in range(10, 60, 10):
        (tmp_path / f"x-step{step:08d}.safetensors").touch()
        (tmp_path / f"x-step{step:08d}-state").mkdir()
        (tmp_path / f"x-step{step:08d}-state" / "state.pt").touch()
    for epoch in range(1, 6):
        (tmp_path / f"x-{epoch:06d}.safetensors").touch()
        (tmp_path / f"x-{epoch:06d}-state").mkdir()
    (tmp_path / "x.safetensors").touch()
    (tmp_path / "other-000001.safetensors").touch()
    return tmp_path


def names(folder, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_steps_within_the_last_n_stay(folder) -> None:
    prune_steps(settings(output_name="x", save_last_n_steps=20), folder, 50)
    kept = [f"x-step{step:08d}" for step in (30, 40, 50)]
    assert names(folder, "x-step*.safetensors") == [f"{name}.safetensors" for name in kept]
    assert names(folder, "x-step*-state") == [f"{name}-state" for name in kept]
    assert len(names(folder, "x-00*.safetensors")) == 5


def test_the_last_n_epochs_stay_and_states_may_differ(folder) -> None:
    options = settings(output_name="x", save_last_n_epochs=3, save_last_n_epochs_state=1)
    prune_epochs(options, folder, 5, every=1)
    assert names(folder, "x-00*.safetensors") == [f"x-{epoch:06d}.safetensors" for epoch in (3, 4, 5)]
    assert names(folder, "x-00????-state") == ["x-000005-state"]
    assert (folder / "x.safetensors").exists()
    assert (folder / "other-000001.safetensors").exists()


def test_nothing_is_removed_unasked(folder) -> None:
    before = names(folder, "*")
    prune_steps(settings(output_name="x"), folder, 50)
    prune_epochs(settings(output_name="x"), folder, 5, every=1)
    assert names(folder, "*") == before


def test_a_state_that_was_resumed_from_can_be_replaced_and_removed(tmp_path) -> None:
    """Optimizers keep the tensors that they were given."""
    folder = tmp_path / "x-step00000001-state"
    parts = {"optimizer": {}, "schedule": {}, "scaler": None}
    save_state(folder, {**parts, "weights": {"x": torch.ones(100)}}, Position(step=1))
    state, _ = load_state(folder)
    save_state(folder, {**parts, "weights": {"x": torch.zeros(100)}}, Position(step=1))
    assert not load_state(folder)[0]["weights"]["x"].any()
    assert state["weights"]["x"].all(), "what was loaded has not changed"
    prune_steps(settings(output_name="x", save_last_n_steps=1), tmp_path, 3)
    assert not list(tmp_path.iterdir())
