"""DeepSpeed's files are read without running what is pickled in them, whichever Python wrote them."""

import functools

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from sft.checkpoint.zero import PlainCheckpoint, load_safely, load_schedule
from sft.launch.processes import UserError


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


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1)])
def test_a_schedule_is_loaded_into_another_number_of_parameter_groups(saved, loaded, tmp_path):
    """Under DeepSpeed the optimizer of LoRA has one group, else a second one without parameters."""

    def make_schedule(num_groups: int):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)]
        return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(groups, lr=8.0), functools.partial(pow, 0.5))

    before = make_schedule(saved)
    before.optimizer.step()
    before.step()
    torch.save(before.state_dict(), tmp_path / "scheduler.pt")
    after = make_schedule(loaded)
    load_schedule(after, tmp_path / "scheduler.pt")
    assert after.get_last_lr() == [4.0] * loaded
    after.optimizer.step()
    after.step()
    assert after.get_last_lr() == [2.0] * loaded


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_states_of_another_optimizer_than_adamw_are_refused_in_a_line(momentum, tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
    weight.grad = torch.ones(1)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match=r"the optimizer states of AdamW alone; resume with the old ones"):
        PlainCheckpoint(tmp_path, [["weight"]]).get("weight", "exp_avg")
