"""What a run gives: ordinary folders with card and generation config, merged where asked, pushed if possible."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from atesd.cli.export import run_export
from atesd.recipe import build_config
from atesd.train import export
from atesd.train.card import model_card
from atesd.train.loop import Trainer
from atesd.types import UserError

from trust import BASE

IDS = torch.tensor([[5, 9, 4, 11, 3]])
ASKED: dict[str, Any] = {
    "out": None,
    "merge": False,
    "dtype": None,
    "which": "final",
    "push_to_hub": None,
    "private": False,
}


def trained(out: Path, **sections: Any) -> Path:
    tree = BASE | {"step": {"num_steps": 2, "problems": 2}, "optim": {"lr": 1e-2}} | sections
    Trainer.start(build_config(tree), out).train()
    return out


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that trained adapters, far enough to be seen."""
    model = {**BASE.get("model", {"path": "pico"}), "lora": {"r": 4, "alpha": 8}}
    return trained(tmp_path_factory.mktemp("runs") / "lora", model=model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_final_is_a_peft_folder_with_everything_beside_it(adapters: Path) -> None:
    final = adapters / "final"
    assert logits(AutoPeftModelForCausalLM.from_pretrained(final)).shape[:2] == IDS.shape
    assert AutoTokenizer.from_pretrained(final).eos_token_id is not None
    assert GenerationConfig.from_pretrained(final).eos_token_id is not None
    card = ModelCard.load(final / "README.md")
    assert card.data.library_name == "peft"
    assert {"atesd", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None, "the packaged model is on no hub"
    rows = [json.loads(line) for line in (adapters / "metrics.jsonl").read_text().splitlines()]
    key = next(key for key in rows[-1] if key.startswith("eval/") and "/avg@" in key and key[-1].isdigit())
    line = next(line for line in card.text.splitlines() if line.startswith(f"| {key.removeprefix('eval/')} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        f"{rows[0][key]:.3f}",
        f"{rows[-1][key]:.3f}",
        f"{rows[-1][f'{key}_low']:.3f} to {rows[-1][f'{key}_high']:.3f}",
    ]
    assert "seed 0, 2 of 2 steps" in card.text or "2 of 2 steps of 2 problems" in card.text
    assert "The teacher sees" in card.text


def test_merged_weights_give_the_adapted_models_logits(adapters: Path, tmp_path: Path) -> None:
    run_export(adapters, **(ASKED | {"merge": True, "out": tmp_path / "merged"}))
    adapted = AutoPeftModelForCausalLM.from_pretrained(adapters / "final")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(merged), logits(adapted), atol=1e-3), "the adapter had moved something"
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.library_name == "transformers"
    assert "merged into the weights" in card.text
    assert "[report.html](report.html)" in card.text
    assert "<html" in (tmp_path / "merged" / "report.html").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template is not None


def test_merging_reads_the_runs_folder_whatever_the_recipe_says_of_the_base(adapters: Path, tmp_path: Path) -> None:
    """A folder has no revision, and 4 bits, which need a library, would be merged into other weights."""
    config = build_config(json.loads((adapters / "config.json").read_text()))
    model = config.model.model_copy(update={"revision": "v1", "quantization": "4bit"})
    export.merge_model(
        config.model_copy(update={"model": model}), adapters / "final", tmp_path / "new", "card", "float32"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    adapted = AutoPeftModelForCausalLM.from_pretrained(adapters / "final")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    assert (tmp_path / "new" / "README.md").read_text() == "card"


def test_merged_weights_may_be_rounded(adapters: Path, tmp_path: Path) -> None:
    run_export(adapters, **(ASKED | {"merge": True, "out": tmp_path / "half", "dtype": "bfloat16"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_a_copy_is_the_folder_with_a_report(adapters: Path, tmp_path: Path) -> None:
    run_export(adapters, **(ASKED | {"which": "best", "out": tmp_path / "copy"}))
    here = {path.name: path.read_bytes() for path in (adapters / "best").iterdir() if path.name != "README.md"}
    there = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert {name: there.get(name) for name in here if name != "manifest.json"} == {
        name: content for name, content in here.items() if name != "manifest.json"
    }
    assert set(there) - set(here) == {"README.md", "report.html"}
    assert "manifest.json" not in there
    assert b"[report.html](report.html)" in there["README.md"], "a card that knows what lies beside it"


def test_an_export_that_fails_leaves_nothing(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("atesd.report.html.write_report", fail)
    with pytest.raises(OSError, match="disk full"):
        run_export(adapters, **(ASKED | {"out": tmp_path / "new"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to do: name a folder with --out"),
        ({"out": Path("new"), "dtype": "float32"}, "--dtype is that of merged weights"),
        ({"out": Path()}, "already exists and is not empty"),
        ({"push_to_hub": "not a name"}, "is no name on the hub"),
        ({"push_to_hub": "me/mine"}, "without a token: log in with hf auth login"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    asked: dict[str, Any], message: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("something").touch()
    monkeypatch.setattr(export, "get_token", lambda: None)
    with pytest.raises(UserError, match=message):
        run_export(adapters, **(ASKED | asked))
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_a_hub_that_does_not_answer_or_refuses_ends_it_before_any_work(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def whoami(self) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr(export, "get_token", lambda: "token")
    monkeypatch.setattr(export, "HfApi", Silent)
    monkeypatch.setattr(export, "copy_model", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UserError, match=r"the hub does not answer \(ConnectionError\)"):
        run_export(adapters, **(ASKED | {"push_to_hub": "me/mine"}))


def test_a_token_that_the_hub_refuses_is_told_from_a_hub_that_is_silent(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def whoami(self) -> None:
            error = HfHubHTTPError.__new__(HfHubHTTPError)
            error.args = ("401 unauthorized",)
            error.response = SimpleNamespace(status_code=401)  # type: ignore[assignment]
            raise error

    monkeypatch.setattr(export, "get_token", lambda: "token")
    monkeypatch.setattr(export, "HfApi", Refusing)
    with pytest.raises(UserError, match=r"the hub refuses the token \(401 unauthorized\); log in again with: hf auth"):
        run_export(adapters, **(ASKED | {"push_to_hub": "me/mine"}))


def test_what_is_pushed_is_the_whole_folder(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    class Hub:
        def whoami(self) -> None:
            pass

        def create_repo(self, repo: str, **options: Any) -> str:
            seen.update(options, repo=repo)
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> None:
            seen.update(uploaded=repo_id, files={path.name for path in folder_path.iterdir()})

    monkeypatch.setattr(export, "get_token", lambda: "token")
    monkeypatch.setattr(export, "HfApi", Hub)
    run_export(adapters, **(ASKED | {"push_to_hub": "me/mine", "private": True}))
    assert (seen["repo"], seen["uploaded"], seen["private"]) == ("me/mine", "me/mine", True)
    assert {"adapter_model.safetensors", "README.md", "report.html", "tokenizer.json"} <= seen["files"]
    assert "pushed to https://hub/me/mine" in capsys.readouterr().out


def test_a_whole_model_has_nothing_to_merge(adapters: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    assert logits(AutoModelForCausalLM.from_pretrained(whole / "final")).shape[:2] == IDS.shape
    assert ModelCard.load(whole / "final" / "README.md").data.library_name == "transformers"
    with pytest.raises(UserError, match="holds a whole model, without an adapter to merge"):
        run_export(whole, **(ASKED | {"merge": True, "out": tmp_path / "new"}))


def test_a_card_names_what_is_on_the_hub_and_fences_what_is_quoted() -> None:
    config = build_config(
        {
            "model": {"path": "Qwen/Qwen3-1.7B"},
            "task": {"kind": "dataset", "path": "owner/name"},
            "prompt": {"student": "```\n{problem}"},
        }
    )
    card = ModelCard(model_card(config, step=3, metrics={}, start={}))
    assert (card.data.base_model, card.data.datasets) == ("Qwen/Qwen3-1.7B", ["owner/name"])
    assert card.text.count("```") == 2
    assert "None was graded." in card.text


def test_a_card_by_hand() -> None:
    """Every number of a card, of a recipe whose settings all differ from the defaults."""
    tree = {
        "seed": 7,
        "model": {"path": "here/a`b/model"},
        "exposure": {"kind": "beta"},
        "step": {"num_steps": 9, "problems": 5},
        "rollout": {"group_size": 6, "temperature": 1.3},
        "eval": {"k": 3, "temperature": 0.7},
        "arms": {"other": ["seed=8"]},
    }
    metrics = {"eval/pico/avg@3": 0.5, "eval/pico/avg@3_low": 0.25, "eval/pico/avg@3_high": 0.75, "loss/total": 1.0}
    start = {"eval/pico/avg@3": 0.125}
    text = model_card(build_config(tree), step=4, metrics=metrics, start=start, report="there.html")
    assert "# model, learned exposure (ATESD)" in text
    assert "from `here/a'b/model`, seed 7, 4 of 9 steps of 5 problems." in text
    assert "On held-out problems, 3 completions each, temperature 0.7." in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table == ["| metric | before | after | 95 % interval |", "| pico/avg@3 | 0.125 | 0.500 | 0.250 to 0.750 |"]
    assert "Report: [there.html](there.html)." in text
    assert '"other"' not in text, "arms are no part of this run"
    assert "- The teacher sees " in text
    for kind, title in (("rl", "reinforced"), ("sft", "supervised"), ("distil", "self-distilled")):
        config = build_config({"routing": {"kind": kind}, "rollout": {"group_size": 2}})
        card = model_card(config, step=0, metrics={}, start={})
        assert f"# {Path(config.model.path).name}, {title}\n" in card
        assert ("The teacher sees" in card) == (kind == "distil")
        assert "Report: `atesd report RUN`." in card


def test_a_folder_here_is_no_base_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    config = build_config({"model": {"path": "owner/name"}})
    assert ModelCard(model_card(config, step=0, metrics={}, start={})).data.base_model is None
