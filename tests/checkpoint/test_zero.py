"""DeepSpeed's files are read without running what is pickled in them, whichever Python wrote them."""

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from sft.checkpoint.zero import load_safely


class Pickled:
    """Is pickled as a call of getattr, as Python 3.11.0 to 3.11.3 pickles a member of an enum."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_a_stage_that_an_older_python_pickled_is_read(tmp_path):
    torch.save({"zero_stage": Pickled(ZeroStageEnum, "gradients"), "step": torch.tensor(3.0)}, tmp_path / "state.pt")
    found = load_safely(tmp_path / "state.pt", known=[ZeroStageEnum])
    assert found["zero_stage"] is ZeroStageEnum.gradients and found["step"] == 3


@pytest.mark.parametrize("arguments", [(ZeroStageEnum, "__subclasses__"), (torch.nn.Parameter, "gradients")])
def test_any_other_attribute_is_refused(arguments, tmp_path):
    torch.save({"zero_stage": Pickled(*arguments)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="holds more than tensors and numbers; no code of it was run"):
        load_safely(tmp_path / "state.pt", known=[ZeroStageEnum])
