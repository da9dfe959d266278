"""Teacher weights: frozen, live, EMA, and the adapter switched off."""

from __future__ import annotations

import pytest
import torch

from atesd.sections import LoraConfig, TeacherConfig
from atesd.train.model import add_lora
from atesd.train.teacher import Teacher
from atesd.types import UserError

from support.models import ragged_rows, tiny_model
from support.steppers import make_stepper

IDS = torch.tensor([[3, 4, 5, 6]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.clone()


def test_a_frozen_teacher_keeps_the_first_weights_and_the_student_keeps_its_own() -> None:
    model = tiny_model()
    first = logits(model)
    stepper, teacher = make_stepper(model)
    stepper.optimize(ragged_rows(4))
    moved = logits(model)
    assert not torch.allclose(first, moved)
    with teacher.in_place():
        assert torch.equal(logits(model), first)
    assert torch.equal(logits(model), moved)


def test_a_live_teacher_is_the_student() -> None:
    model = tiny_model()
    stepper, teacher = make_stepper(model, teacher={"weights": "live"})
    stepper.optimize(ragged_rows(4))
    moved = logits(model)
    with teacher.in_place():
        assert torch.equal(logits(model), moved)


def test_an_ema_teacher_starts_at_the_student_and_follows_the_closed_form() -> None:
    """From theta_0 = 1 with the student held at 3: theta_n = 3 - 2 d^n."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    teacher = Teacher(TeacherConfig(weights="ema", ema_decay=0.9), model)
    with teacher.in_place():
        assert model.weight.item() == 1.0
    torch.nn.init.constant_(model.weight, 3.0)
    for _ in range(5):
        teacher.update()
    with teacher.in_place():
        torch.testing.assert_close(model.weight.data, torch.tensor([[3.0 - 2.0 * 0.9**5]]))
    assert model.weight.item() == 3.0


def test_an_ema_teacher_keeps_999_parts_in_a_thousand_unless_it_is_told_otherwise() -> None:
    """OPSD's code."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(model.weight, 1.0)
    teacher = Teacher(TeacherConfig(weights="ema"), model)
    torch.nn.init.constant_(model.weight, 2.0)
    teacher.update()
    with teacher.in_place():
        assert model.weight.item() == pytest.approx(1.001, abs=1e-12)


@pytest.mark.parametrize("weights", ["frozen", "live", "ema"])
@pytest.mark.parametrize("lora", [False, True])
def test_no_teachers_pass_records_a_gradient(weights: str, lora: bool) -> None:
    model = add_lora(tiny_model(), LoraConfig(r=4), 0) if lora else tiny_model()
    with Teacher(TeacherConfig.model_validate({"weights": weights}), model).in_place():
        assert not model(IDS).logits.requires_grad
    assert model(IDS).logits.requires_grad


def test_an_ema_teacher_of_a_student_at_rest_stays_where_it_is() -> None:
    model = tiny_model()
    teacher = Teacher(TeacherConfig(weights="ema", ema_decay=0.5), model)
    before = logits(model)
    for _ in range(3):
        teacher.update()
    with teacher.in_place():
        torch.testing.assert_close(logits(model), before)


def testadd_lora_the_frozen_teacher_is_the_adapter_switched_off() -> None:
    base = tiny_model()
    first = logits(base)
    model = add_lora(tiny_model(), LoraConfig(r=4, alpha=8), 0)
    stepper, teacher = make_stepper(model)
    stepper.optimize(ragged_rows(4))
    assert not torch.allclose(logits(model), first)
    with teacher.in_place():
        assert torch.equal(logits(model), first)
    assert not teacher.tensors()


def test_a_checkpoint_holds_the_average_alone_and_all_of_it() -> None:
    frozen, averaged = (Teacher(TeacherConfig(weights=kind), tiny_model()) for kind in ("frozen", "ema"))
    kept = averaged.tensors()
    assert set(kept) == {name for name, _ in tiny_model().named_parameters()}
    assert not frozen.tensors()
    averaged.load_tensors(kept)
    frozen.load_tensors({})
    for teacher, other in ((averaged, {}), (averaged, dict(list(kept.items())[1:])), (frozen, kept)):
        with pytest.raises(UserError, match="holds other teacher weights than this run's"):
            teacher.load_tensors(other)


def test_every_update_of_a_step_moves_the_ema_teacher() -> None:
    model = tiny_model()
    first = model.model.norm.weight.detach().clone()
    stepper, teacher = make_stepper(model, teacher={"weights": "ema", "ema_decay": 0.9})
    stepper.optimize(ragged_rows(4))
    moved = model.model.norm.weight.detach().clone()
    assert not torch.equal(first, moved)
    with teacher.in_place():
        torch.testing.assert_close(model.model.norm.weight.data, 0.9 * first + 0.1 * moved)
