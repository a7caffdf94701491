"""A model is rebuilt beside its checkpoint, which stays as it is."""

import pytest

from sft.checkpoint.consolidate import choose_target


def test_a_model_is_rebuilt_beside_the_checkpoint_that_was_named(tmp_path, monkeypatch):
    """In a checkpoint it would be files that are not in its manifest: the checkpoint could not be resumed."""
    checkpoint = tmp_path / "checkpoint-20"
    checkpoint.mkdir()
    assert choose_target(checkpoint, None) == tmp_path / "consolidated"
    monkeypatch.chdir(checkpoint)
    assert choose_target(checkpoint.relative_to(checkpoint), None) == tmp_path / "consolidated"
    with pytest.raises(ValueError, match="model: is inside the checkpoint, which must stay as it is"):
        choose_target(checkpoint, "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty; name a new folder with --output"):
        choose_target(checkpoint, str(tmp_path / "full"))
