"""Shares of a tiny model's weights: updates are those of one process, and what is gathered and added up is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atesd.train.batch import Row
from atesd.train.checkpoint import load_optimizer, load_teacher, save_checkpoint
from atesd.train.shard import local, piece
from atesd.train.world import World
from atesd.types import Elsewhere, NonFiniteError, UserError

from support.models import PAD, ragged_rows, tiny_model
from support.processes import NEEDS_SHARDS, together
from support.steppers import make_stepper

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    NEEDS_SHARDS,
]

# A clip that bites, a token budget that cuts the rows unevenly, and no more of Adam than is not rounding.
SECTIONS: dict[str, Any] = {
    "optim": {"lr": 1e-2, "max_grad_norm": 0.1, "eps": 1e-4},
    "step": {"token_budget": 30},
    "loss": {"tile_logits": 50},
}
CASES: dict[str, dict[str, Any]] = {
    "frozen": {"tied": True},
    "ema": {"tied": False, "teacher": {"weights": "ema", "ema_decay": 0.5}},
    "two updates": {"tied": True, "teacher": {"weights": "live"}, "step": {"token_budget": 30, "updates_per_batch": 2}},
    "selection": {"tied": True, "selection": {"kind": "tip", "score": "soft_or", "ratio": 0.5}},
}


def batches(components: tuple[str, ...] = ("distil",)) -> list[list[Row]]:
    return [ragged_rows(5, components=components), ragged_rows(4, seed=1, components=components)]


def updated(case: dict[str, Any], rows: Sequence[Sequence[Row]], **given: Any) -> Any:
    """Return the metrics of every step, the weights, and the teacher's, whole."""
    sections = SECTIONS | case
    model = tiny_model(tied=sections.pop("tied"))
    with torch.no_grad():  # else a pass over a pad token has no gradient that could be left in by mistake
        model.get_input_embeddings().weight[PAD] = torch.linspace(-1, 1, 32)
    stepper, teacher = make_stepper(model, **given, **sections)
    metrics = [dict(stepper.optimize(each).metrics) for each in rows]
    with stepper._teachers.held():
        kept = teacher._held or teacher._weights
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return metrics, weights, {name: value.clone() for name, value in kept.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_updates_over_shares_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    rows = batches()
    found = together(tmp_path, 2, lambda rank: updated(CASES[name], rows, world=World.join(), shard=True))
    metrics, weights, kept = updated(CASES[name], rows)
    assert found[0][0] == found[1][0], "a process went by other numbers"
    for logged, expected in zip(found[0][0], metrics, strict=True):
        expected["optim/micro_batches"] = logged["optim/micro_batches"]
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert logged["optim/grad_norm"] > 0.1, "the clip must bite"
    for _, shared_weights, shared_kept in found:
        assert_near(shared_weights, weights)
        assert_near(shared_kept, kept)
    start = dict(tiny_model(tied=CASES[name]["tied"]).named_parameters())
    moved = [name for name, value in weights.items() if (value - start[name]).abs().max() > 1e-3]
    assert any(".layers." in each for each in moved), "nothing moved"


def watch() -> tuple[list[str], list[str]]:
    """Note what is gathered and what is added up from here on: of a layer, or of the rest."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as within

    gathers: list[str] = []
    sums: list[str] = []

    def noting(notes: list[str], original: Any) -> Any:
        def exchange(weights: Any, *given: Any, **named: Any) -> Any:
            notes.append("layer" if ".layers." in weights[0]._param_fqn else "root")
            return original(weights, *given, **named)

        return exchange

    within.foreach_all_gather = noting(gathers, within.foreach_all_gather)
    within.foreach_reduce = noting(sums, within.foreach_reduce)
    return gathers, sums


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_gathered_once_an_update_and_its_gradient_added_up_once(tied: bool, tmp_path: Path) -> None:
    """However many micro-batches and tiles there are; a layer is gathered for both of its passes in each."""
    case = {"tied": tied, "teacher": {"weights": "live"}, "step": {"token_budget": 1, "updates_per_batch": 2}}
    rows = [ragged_rows(10)]

    def count(rank: int) -> Any:
        gathers, sums = watch()
        updated(case, rows, world=World.join(), shard=True)
        return {name: (gathers.count(name), sums.count(name)) for name in ("root", "layer")}

    found = together(tmp_path, 2, count)
    assert found[1] == found[0]
    layers, updates, micro_batches = 2, 2, 3  # two processes share five rows an update: three and two
    whole = 1 + updates  # before the first update, and behind each
    assert found[0]["root"] == (whole, updates)
    assert found[0]["layer"] == (layers * (whole + updates * 2 * micro_batches), layers * updates * micro_batches)


def test_a_process_without_rows_takes_part(tmp_path: Path) -> None:
    rows = [ragged_rows(2), ragged_rows(1, seed=3)]
    case = {"tied": False, "step": {"token_budget": 1}}
    found = together(tmp_path, 3, lambda rank: updated(case, rows, world=World.join(), shard=True))
    _, weights, _ = updated(case, rows)
    for _, shared_weights, _ in found:
        assert_near(shared_weights, weights)


def test_gradients_that_break_are_explained_and_move_nothing(tmp_path: Path) -> None:
    rows = [replace(each, weight=math.inf) for each in ragged_rows(4)]

    def breaks(rank: int) -> tuple[str, bool]:
        model = tiny_model()
        stepper, _ = make_stepper(model, world=World.join(), shard=True)
        with pytest.raises((NonFiniteError, Elsewhere)) as error, World.join().sound():
            stepper.optimize(rows)
        return str(error.value), all(map(torch.equal, model.parameters(), tiny_model().parameters()))

    for line, is_still in together(tmp_path, 2, breaks):
        assert "the loss component distil overflows" in line
        assert is_still


def test_shares_on_disk_are_put_together_and_cut_anew(tmp_path: Path) -> None:
    """What two processes wrote is read by two, by three and by one alone."""
    case = SECTIONS | {"teacher": {"weights": "ema", "ema_decay": 0.5}}

    def state(stepper: Any) -> dict[str, Tensor]:
        trained = dict(stepper._scorer.model.named_parameters())
        slots = stepper._optimizer.optimizer.state_dict()["state"]
        return {f"{name}/{key}": local(slots[place][key]) for place, name in enumerate(trained) for key in slots[place]}

    def save(rank: int) -> Any:
        model, world = tiny_model(), World.join()
        stepper, teacher = make_stepper(model, world=world, shard=True, **case)
        stepper.optimize(ragged_rows(4))
        save_checkpoint(
            tmp_path,
            1,
            model=model,
            tokenizer=None,
            optimizer=stepper._optimizer,
            teacher=teacher.tensors(),
            state={},
            keep=1,
            shards=stepper._shards,
        )
        world.barrier()
        return load(rank)[:2]

    def load(rank: int, *, shard: bool = True) -> Any:
        model, folder = tiny_model(seed=5), tmp_path / "step_000001"
        stepper, teacher = make_stepper(model, world=World.join(), shard=shard, **case)
        load_optimizer(folder, model, stepper._optimizer, stepper._shards)
        teacher.load_tensors(load_teacher(folder, stepper._shards))
        return state(stepper), {name: local(each).clone() for name, each in teacher.tensors().items()}

    def joined(hands: Sequence[Any], kind: int) -> dict[str, Tensor]:
        parts = [hand[kind] for hand in hands]
        return {
            name: torch.cat([part[name] for part in parts]) if value.dim() else value
            for name, value in parts[0].items()
        }

    two, three = together(tmp_path / "a", 2, save), together(tmp_path / "b", 3, load)
    alone = load(0, shard=False)
    for kind in (0, 1):
        for hands in (two, three):
            together_again = joined(hands, kind)
            assert together_again.keys() == alone[kind].keys()
            assert all(torch.equal(value, alone[kind][name]) for name, value in together_again.items())
    assert any(value.abs().max() > 0 for name, value in alone[0].items() if name.endswith("exp_avg"))


def test_pieces_are_what_fully_shard_keeps(tmp_path: Path) -> None:
    """And what is written into whole weights becomes the shares."""

    def compare(rank: int) -> bool:
        model, world = tiny_model(), World.join()
        stepper, _ = make_stepper(model, world=world, shard=True)
        shards: Any = stepper._shards
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2)
        shards.absorb()
        return all(
            torch.equal(local(shards._shares[name]), piece(2 * weight, world))
            for name, weight in tiny_model().named_parameters()
        )

    assert together(tmp_path, 3, compare) == [True] * 3


def test_a_model_that_does_not_name_its_layers_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model._no_split_modules = None
    with pytest.raises(UserError, match="does not say which of its layers belong together"):
        make_stepper(model, world=World(0, 2), shard=True)
