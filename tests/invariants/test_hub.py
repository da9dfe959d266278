"""Models and data sets of a hub, by id and revision, and models pushed to it: commands against an imitation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from support.folders import TEMPLATE, write_byte_model
from support.hub import TOKEN, Done, Hub, Session

EMBEDDING = "model.embed_tokens.weight"
RECIPE = """
threads = 1
model = {{path = "org/tiny"}}
task = {{kind = "jsonl", path = "{problems}", probe_size = 2, eval_size = 2}}
rollout = {{max_new_tokens = 4}}
prompt = {{student = "{{problem}}", teacher = "{{problem}} {{hint}}"}}
step = {{num_steps = 1, problems = 2}}
eval = {{k = 1}}
"""
LORA = "model.lora={r=2,alpha=4}"
ADAPTER = {"r": 2, "alpha": 4}


@dataclass
class Place:
    """A hub, a process whose hub it is, and what was put there."""

    hub: Hub
    session: Session
    root: Path
    commits: dict[str, str]

    def run(self, command: str, *overrides: str, token: str | None = None, recipe: bool = True) -> Done:
        """Run a command on the recipe; forget what was asked before."""
        self.hub.taken()
        given = [str(self.root / "recipe.toml")] if recipe else []
        return self.session.run(command, *given, *overrides, token=token)

    def refused(self, words: str, command: str, *overrides: str, token: str | None = None, recipe: bool = True) -> None:
        """Run a command that ends in one line, and sleeps little before it."""
        done = self.run(command, *overrides, token=token, recipe=recipe)
        assert done.code == 2, done
        assert words in done.err
        assert done.err.count("\n") == 1, done.err
        assert done.err.startswith("error: ")
        assert len(self.hub.asked) < 12, "nothing is tried again and again"
        assert done.slept_s < 30

    def sums(self, branch: str) -> dict[str, float]:
        """Return the sums of the weights that a branch was given."""
        tensors = load_file(self.root / branch / "model.safetensors")
        return {name: float(tensor.double().sum()) for name, tensor in tensors.items()}


def variant(root: Path, name: str, scale: float) -> Path:
    """Write a model whose weights and prompts are those of one branch alone."""
    folder = shutil.copytree(root / "first", root / name)
    tensors = load_file(folder / "model.safetensors")
    save_file({key: scale * value for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "chat_template.jinja").write_text(template(name))
    return folder


def template(name: str) -> str:
    return TEMPLATE.replace("{{ m.content }}", f"[{name}]{{{{ m.content }}}}")


def problems(word: str) -> str:
    rows = [{"problem": f"{word} {n} and 1.", "solution": f"One more.\n\\boxed{{{n + 1}}}"} for n in range(8)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("hub")
    write_byte_model(root / "first")
    (root / "problems.jsonl").write_text(problems("Add"))
    (root / "recipe.toml").write_text(RECIPE.format(problems=root / "problems.jsonl"))
    with Hub() as hub, Session(hub, root / "cache", root) as session:
        commits = {
            "main": hub.add("models/org/tiny", variant(root, "main", 0.5)),
            "v1": hub.add("models/org/tiny", variant(root, "v1", 0.75), "v1"),
        }
        for name, kind in (("gated", {"gated": True}), ("private", {"private": True}), ("later", {}), ("half", {})):
            hub.add(f"models/org/{name}", root / "main", **kind)
        for branch, word in (("main", "Add"), ("v1", "Sum")):
            data = root / f"data-{branch}"
            data.mkdir()
            (data / "train.jsonl").write_text(problems(word))
            hub.add("datasets/org/sums", data, branch)
        hub.add("datasets/org/gated", data, gated=True)
        hub.add("datasets/org/later", data)
        yield Place(hub, session, root, commits)


@pytest.fixture(scope="module")
def adapters(place: Place) -> Path:
    """Return a run that trained adapters on the branch v1."""
    out = place.root / "adapters"
    done = place.run("train", LORA, "model.revision=v1", "--out", str(out))
    assert (done.code, done.err) == (0, "")
    assert not [each for each in place.hub.asked if "main" in each], "saving adapters asks for nothing"
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_revision_has_its_own_weights_and_tokenizer(place: Place) -> None:
    for revision, branch in ((None, "main"), ("v1", "v1"), (place.commits["v1"], "v1")):
        found = place.session.load({"path": "org/tiny", "revision": revision})
        assert found["sums"] == pytest.approx(place.sums(branch), rel=1e-12)
        assert found["template"] == template(branch)
        shown = place.run("show", "--count", "1", *([f'model.revision="{revision}"'] if revision else []))
        assert f"[{branch}]Add" in shown.out, "also where no weights are read"


def test_a_run_goes_on_with_the_commit_that_it_began_with(place: Place, adapters: Path) -> None:
    assert read(adapters / "env.json")["model_commit"] == place.commits["v1"]
    assert read(adapters / "final" / "adapter_config.json")["revision"] == place.commits["v1"]
    assert read(adapters / "config.json")["model"]["revision"] == "v1"
    assert "from `org/tiny` at revision `v1`, seed 0" in (adapters / "final" / "README.md").read_text()
    moved = place.hub.add("models/org/tiny", place.root / "main", "v1")
    try:
        done = place.run("train", "--resume", str(adapters), "step.num_steps=2", recipe=False)
        assert (done.code, done.err) == (0, "warning: the run goes on to step 2 instead of 1\n")
        assert not [each for each in place.hub.asked if moved in each]
        assert read(adapters / "final" / "adapter_config.json")["revision"] == place.commits["v1"]
        found = place.session.load({"path": str(adapters / "final")})
        assert found["sums"][EMBEDDING] == pytest.approx(place.sums("v1")[EMBEDDING], rel=1e-12)
        assert place.run("eval", str(adapters), recipe=False).code == 0
    finally:
        place.hub.add("models/org/tiny", place.root / "v1", "v1")


def test_a_whole_model_goes_on_too(place: Place) -> None:
    """Its teacher is the commit that it began with; the hub says nothing of a run without a revision but main."""
    out = place.root / "whole"
    assert place.run("train", "--out", str(out)).code == 0
    assert read(out / "env.json")["model_commit"] == place.commits["main"]
    assert "from `org/tiny`, seed 0" in (out / "final" / "README.md").read_text()
    moved = place.hub.add("models/org/tiny", place.root / "v1")
    try:
        assert place.run("train", "--resume", str(out), "step.num_steps=2", recipe=False).code == 0
        assert not [each for each in place.hub.asked if moved in each]
    finally:
        place.hub.add("models/org/tiny", place.root / "main")


def test_what_the_hub_refuses_is_one_line(place: Place) -> None:
    nowhere = str(place.root / "nowhere")
    unknown = "is neither a folder here nor a model on the hub that you may read: mend the name, or log in with"
    gated = "the model 'org/gated' is gated: accept its terms on its page, and log in with: hf auth login"
    place.refused(
        "the model 'org/tiny' has no revision 'v9': give a branch", "train", "model.revision=v9", "--out", nowhere
    )
    for token in (None, TOKEN):
        place.refused(f"'org/none' {unknown}", "train", "model.path=org/none", "--out", nowhere, token=token)
        place.refused(gated, "train", "model.path=org/gated", "--out", nowhere, token=token)
    place.refused(f"'org/private' {unknown}", "show", "model.path=org/private")
    assert place.run("show", "model.path=org/private", "--count", "1", token=TOKEN).code == 0
    place.refused(
        "'org/later' is no folder here, and the hub refuses the token: log in again with hf auth login",
        "show", "model.path=org/later", token="hf_old",
    )  # fmt: skip
    place.hub.failing = 503
    try:
        place.refused("(it answers 503): give a folder, or download the model first", "show", "model.path=org/later")
        assert len(place.hub.asked) == 1, "it is not tried again"
    finally:
        place.hub.failing = None
    assert not Path(nowhere).exists()


def test_a_hub_that_is_gone_is_not_missed_by_what_the_cache_has(place: Place) -> None:
    for revision in (None, "v1"):
        place.session.load({"path": "org/tiny", "revision": revision})
    assert place.run("plan", "model.path=org/half").code == 0, "which reads config.json alone"
    place.hub.go()
    try:
        for revision, branch in ((None, "main"), ("v1", "v1"), (place.commits["v1"], "v1")):
            found = place.session.load({"path": "org/tiny", "revision": revision})
            assert found["sums"] == pytest.approx(place.sums(branch), rel=1e-12)
            assert found["template"] == template(branch)
        out = place.root / "offline"
        done = place.run("train", LORA, "model.revision=v1", "--out", str(out))
        assert (done.code, done.err) == (0, "")
        assert read(out / "final" / "adapter_config.json")["revision"] == place.commits["v1"]
        place.refused("'org/later' is no folder here, and the hub cannot be asked for a model of that name (no conn",
                      "show", "model.path=org/later")  # fmt: skip
        place.refused("(no connection): give a folder", "show", "model.revision=v9")
        for command in (["show"], ["train", "--out", str(place.root / "nowhere")]):
            place.refused("of which the cache holds a part only: download it", *command, "model.path=org/half")
    finally:
        place.hub.come()
    place.hub.failing = 500
    try:
        place.hub.taken()
        assert place.session.load({"path": "org/tiny", "revision": "v1"})["template"] == template("v1")
        assert set(place.hub.asked) == {"GET /api/models/org/tiny/revision/v1"}, "no file is asked for"
    finally:
        place.hub.failing = None


def test_weights_that_the_cache_lacks_are_told_from_damage(place: Place) -> None:
    assert place.run("show", "model.path=org/half", "--count", "1").code == 0, "config and tokenizer"
    place.hub.go()
    try:
        nowhere = str(place.root / "nowhere")
        place.refused("holds a part only: download it", "train", "model.path=org/half", "--out", nowhere)
    finally:
        place.hub.come()


def test_an_adapter_in_a_folder_has_the_base_that_it_was_trained_on(place: Place, adapters: Path) -> None:
    folder = shutil.copytree(adapters / "final", place.root / "moved")
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
    found = place.session.load({"path": str(folder)})
    assert found["sums"][EMBEDDING] == pytest.approx(place.sums("v1")[EMBEDDING], rel=1e-12)
    assert found["template"] == template("v1"), "its tokenizer is of the same commit"
    place.refused("has no effect on the folder", "show", f"model.path={folder}", "model.revision=main")
    assert "[v1]Add" in place.run("show", f"model.path={folder}", "--count", "1").out
    assert place.run("plan", f"model.path={folder}").code == 0
    assert f"GET /api/models/org/tiny/revision/{place.commits['v1']}" in place.hub.asked
    on_top = place.session.load({"path": str(folder), "lora": ADAPTER})
    assert on_top["base"] == [str(folder), None], "a second adapter needs the first"


def test_a_pushed_run_arrives_whole_and_loads(place: Place, adapters: Path) -> None:
    out = place.root / "exported"
    done = place.run(
        "export", str(adapters), "--out", str(out), "--push-to-hub", "me/mine", "--private", token=TOKEN, recipe=False
    )
    assert done.code == 0, done
    assert f"pushed to {place.hub.url}/me/mine" in done.out
    pushed = place.hub.files("models/me/mine")
    assert pushed == {".gitattributes": b""} | {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "report.html"} <= set(
        pushed
    )
    assert b"[report.html](report.html)" in pushed["README.md"]
    assert place.hub.repositories["models/me/mine"].private
    place.refused("'me/mine' is neither a folder here nor a model", "show", "model.path=me/mine")
    place.hub.repositories["models/me/mine"].private = False
    here, there = (place.session.load({"path": path}) for path in (str(adapters / "final"), "me/mine"))
    assert here == there
    assert here["sums"] != place.session.load({"path": "org/tiny", "revision": "v1"})["sums"], "it was trained"
    commit = place.hub.repositories["models/me/mine"].branches["main"]
    assert place.session.load({"path": "me/mine", "lora": ADAPTER})["base"] == ["me/mine", commit]
    assert place.run("eval", "me/mine", "--recipe", str(place.root / "recipe.toml"), recipe=False).code == 0
    place.hub.go()
    try:
        assert place.session.load({"path": "me/mine"}) == here
    finally:
        place.hub.come()
    merged = place.run("export", str(adapters), "--merge", "--push-to-hub", "me/merged", token=TOKEN, recipe=False)
    assert merged.code == 0
    assert not place.hub.repositories["models/me/merged"].private
    assert place.session.load({"path": "me/merged"})["sums"] == pytest.approx(here["sums"], rel=1e-5, abs=1e-5)


def test_what_cannot_be_pushed_says_so_before_or_after(place: Place, adapters: Path) -> None:
    push = ["export", str(adapters), "--push-to-hub", "me/not"]
    place.refused("without a token: log in with hf auth login", *push, recipe=False)
    place.refused("the hub refuses the token (Invalid user token.", *push, token="hf_old", recipe=False)
    out = place.root / "kept"
    place.hub.failing_pushes = True
    try:
        place.refused("(403 Forbidden: You have no right to write here): push it later with: hf upload me/not FOLDER, "
                      "after exporting to a folder with --out", *push, token=TOKEN, recipe=False)  # fmt: skip
        done = place.run(*push, "--out", str(out), token=TOKEN, recipe=False)
        assert f"hf upload me/not {out}\n" in done.err
        assert (out / "README.md").is_file()
    finally:
        place.hub.failing_pushes = False
    place.hub.failing = 500
    try:
        place.refused("the hub does not answer (it answers 500); export to a folder", *push, token=TOKEN, recipe=False)
    finally:
        place.hub.failing = None
    place.hub.go()
    try:
        place.refused("the hub does not answer (ConnectError); export to a folder", *push, token=TOKEN, recipe=False)
    finally:
        place.hub.come()


def data_set(name: str, revision: str | None = None) -> str:
    named = "" if revision is None else f', revision="{revision}"'
    return f'task={{kind="dataset", path="{name}", probe_size=2, eval_size=2{named}}}'


def test_a_data_set_has_the_rows_of_its_revision(place: Place) -> None:
    commit = place.hub.repositories["datasets/org/sums"].branches["v1"]
    place.session.load({"path": "org/tiny"})
    for revision, word in ((None, "Add"), ("v1", "Sum"), (commit, "Sum")):
        assert f"{word} " in place.run("show", data_set("org/sums", revision), "--count", "1").out
    place.refused("(Revision 'v9' doesn't exist for dataset 'org/sums' on the Hub): mend task.revision",
                  "show", data_set("org/sums", "v9"))  # fmt: skip
    place.refused("doesn't exist on the Hub or cannot be accessed): mend the name", "show", data_set("org/none"))
    place.refused("ask for access on its page, then log in", "show", data_set("org/gated"))
    place.refused("(it refuses the token: log in again with", "show", data_set("org/later"), token="hf_old")
    for failing in (500, None):
        place.hub.failing = failing
        if failing is None:
            place.hub.go()
        try:
            # `datasets` offline reads the revision cached last, whichever is asked for.
            assert "Sum " in place.run("show", data_set("org/sums"), "--count", "1").out
            place.refused(
                "cannot be read of revision 'v1': the hub does not answer", "show", data_set("org/sums", "v1")
            )
            place.refused("and the cache does not have it: check the network", "show", data_set("org/later"))
        finally:
            place.hub.failing = None
            if failing is None:
                place.hub.come()
