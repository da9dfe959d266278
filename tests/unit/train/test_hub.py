"""Models that cannot be found: each ends at once, in a line that says why."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from atesd.train import hub
from atesd.train.hub import base_of_adapter, locate
from atesd.types import UserError


class Api:
    """Stands in for the hub: answers with what it was given, and keeps what it was asked."""

    def __init__(self, answer: Any, access: Exception | None = None) -> None:
        self.answer, self.access = answer, access
        self.asked: list[Any] = []

    def __call__(self) -> Api:
        return self

    def model_info(self, path: str, **asked: Any) -> Any:
        self.asked.append((path, asked))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def auth_check(self, path: str) -> None:
        if self.access is not None:
            raise self.access


def refusal(kind: type[HfHubHTTPError], status: int = 404) -> HfHubHTTPError:
    """Return an error of the hub without a request behind it."""
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
    return error


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)


def test_a_model_on_the_hub_is_asked_for_once_by_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(SimpleNamespace(gated=False), access=AssertionError("nobody asked"))
    monkeypatch.setattr(hub, "HfApi", api)
    assert locate("owner/name") == {}
    assert locate("owner/name", "v1") == {"revision": "v1"}
    assert api.asked == [("owner/name", {"revision": None, "timeout": 10.0}),
                         ("owner/name", {"revision": "v1", "timeout": 10.0})]  # fmt: skip


def test_a_folder_is_asked_for_nowhere_and_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api(AssertionError("asked")))
    assert locate(str(tmp_path)) == {}
    with pytest.raises(UserError, match=r"model\.revision = 'main' has no effect on the folder .*: remove it"):
        locate(str(tmp_path), "main")


@pytest.mark.parametrize(("answer", "words"), [
    (refusal(RepositoryNotFoundError), "neither a folder here nor a model on the hub that you may read: mend the name"),
    (refusal(RevisionNotFoundError), r"the model 'owner/name' has no revision 'v9': give a branch, a tag or a commit"),
    (refusal(GatedRepoError, 403), "the model 'owner/name' is gated: accept its terms on its page, and log in"),
    (refusal(HfHubHTTPError, 401), "and the hub refuses the token: log in again with hf auth login, or unset HF_TOKEN"),
    (refusal(HfHubHTTPError, 503), r"the hub cannot be asked for a model of that name \(it answers 503\): give a"),
    (OfflineModeIsEnabled("off"), r"\(no connection\): give a folder, or download the model first"),
    (TimeoutError("slow"), r"\(no connection\): give a folder, or download the model first"),
])  # fmt: skip
def test_what_cannot_be_had_says_why(answer: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api(answer))
    with pytest.raises(UserError, match=words):
        locate("owner/name", "v9")


def test_a_gated_model_is_asked_whether_it_may_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api(SimpleNamespace(gated="auto"), refusal(GatedRepoError, 403)))
    with pytest.raises(UserError, match="is gated"):
        locate("owner/name")


def test_a_cached_model_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hub, "HfApi", Api(TimeoutError()))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *given, **more: asked.append((given, more)) or "a/file")
    assert locate("owner/name", "v1") == {"revision": "v1", "local_files_only": True}
    assert asked == [(("owner/name", "config.json"), {"revision": "v1"})]


@pytest.mark.parametrize("path", ["/no/folder", "no folder", "a/b/c", "../no-folder"])
def test_what_can_be_no_id_is_not_asked_for(path: str) -> None:
    """With the hub's own client, which refuses before it connects."""
    with pytest.raises(UserError, match="is neither a folder here nor an id on the hub, such as"):
        locate(path)


def test_the_base_of_an_adapter_is_what_its_config_names(tmp_path: Path) -> None:
    assert base_of_adapter(str(tmp_path)) is None
    config = tmp_path / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "owner/name"}')
    assert base_of_adapter(str(tmp_path)) == ("owner/name", None)
    config.write_text('{"base_model_name_or_path": "owner/name", "revision": "v1"}')
    assert base_of_adapter(str(tmp_path)) == ("owner/name", "v1")
    config.write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "revision": "v1"}))
    assert base_of_adapter(str(tmp_path)) == (str(tmp_path), None), "a folder has no revision"
    for content, words in (
        ('{"base_model_name_or_path": null}', "does not name the adapter's base"),
        (
            '{"base_model_name_or_path": "/no/base"}',
            "names the adapter's base model '/no/base', where there is no folder",
        ),
        ('{"base_model_name_or_path": "../no-base"}', "where there is no folder: set base_model_name_or_path in it to"),
        ("{", "damaged"),
    ):
        config.write_text(content)
        with pytest.raises(UserError, match=words):
            base_of_adapter(str(tmp_path))


def test_a_folder_that_a_command_will_write_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atesd.train.hub._ask", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="there is no folder 'runs/smollm2-warm' yet: a run or a warm-up writes it"):
        locate("runs/smollm2-warm")
