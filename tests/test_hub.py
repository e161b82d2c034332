"""Pushing and loading by the real client of the Hub, against a Hub on 127.0.0.1."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers as tf
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http, close_session
from loopback_hub import LoopbackHub, Repo
from tiny import tiny_folder, tiny_model
from typer.testing import CliRunner

from hf_layerprobe import (
    HubError,
    LayerProbe,
    LayerProbeError,
    PruningError,
    PruningPlan,
    docs,
    plan_pruning,
    prune_checkpoint,
    prune_layers,
    push_model,
)
from hf_layerprobe.cli import app

TOKEN = "hf_writer"


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hub that this process' client talks to, with an empty cache and nobody logged in."""
    server = LoopbackHub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    home = tmp_path_factory.mktemp("home")
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(
            constants, name, value, raising=name != "HF_URL_HOSTS"
        )  # older clients do not check the host
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # newer versions keep a client
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)  # older versions call its functions
    # Older clients validate cards at huggingface.co whatever the endpoint.
    post = SimpleNamespace(
        post=lambda url, **options: _http.get_session().post(
            url.replace("https://huggingface.co", server.endpoint), **options
        )
    )
    monkeypatch.setattr("huggingface_hub.repocard.get_session", lambda: post)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between the client's retries
    server.home = home
    yield server
    server.shutdown()
    server.server_close()
    close_session()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A pruned model's folder, with the tokenizer."""
    base = tiny_folder(tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("pruned") / "small"
    prune_layers(base, remove=[1], output_dir=folder, tokenizer=tf.AutoTokenizer.from_pretrained(base))
    return folder


def store(hub, name, folder, **options):
    """Puts a folder into a repository, without the client."""
    repo = hub.repos[name] = Repo(**options)
    repo.commit("main", contents(folder), "initial commit")
    return repo


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_model(one, other):
    assert type(one) is type(other)
    assert one.config.to_dict() | {"_name_or_path": ""} == other.config.to_dict() | {"_name_or_path": ""}
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_prune_and_push_then_load_by_id(hub, tmp_path, caplog):
    caplog.set_level("DEBUG")
    base = tiny_folder(tmp_path / "base")
    pruned = prune_layers(
        base, remove=[1, 2], output_dir=tmp_path / "out", tokenizer=tf.AutoTokenizer.from_pretrained(base),
        push_to_hub=True, repo_id="ada/small", private=True, token=TOKEN,
    )  # fmt: skip
    repo = hub.repos["ada/small"]
    assert repo.private and repo.messages == ["initial commit", "Remove layers [1, 2]"]  # one commit
    sent = repo.commits[repo.branches["main"]]
    assert {name: data for name, data in sent.items() if name != ".gitattributes"} == contents(tmp_path / "out")
    assert b'from_pretrained("ada/small")' in sent["README.md"]
    loaded = tf.AutoModelForCausalLM.from_pretrained("ada/small", token=TOKEN)
    assert_same_model(loaded, tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert_same_model(loaded, pruned)
    assert tf.AutoTokenizer.from_pretrained("ada/small", token=TOKEN)("abc") == tf.AutoTokenizer.from_pretrained(base)(
        "abc"
    )
    assert PruningPlan.from_pretrained("ada/small", token=TOKEN) == PruningPlan.load(tmp_path / "out")
    # Neither the storage nor any file nor log has seen the token.
    assert "Request" in caplog.text and TOKEN not in caplog.text
    assert not any(had_token for _, path, had_token in hub.requests if path.startswith("/storage/"))
    assert not any(TOKEN.encode() in data for folder in (tmp_path, hub.home) for data in contents(folder).values())
    assert not any(str(tmp_path).encode() in data or str(Path.home()).encode() in data for data in sent.values())


class Mixed(LayerProbe, tf.LlamaForCausalLM):
    """A user's own class."""


def test_what_a_mixin_pushes_is_a_plain_model(hub, tmp_path, monkeypatch):
    """Both ways of Transformers upload the folder that `save_pretrained` has written."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = Mixed(tiny_model("llama").config)
    model.push_to_hub("ada/one")
    model.save_pretrained(str(tmp_path / "other"), push_to_hub=True, repo_id="ada/other")
    for name in ("ada/one", "ada/other"):
        assert type(tf.AutoModelForCausalLM.from_pretrained(name)) is tf.LlamaForCausalLM
        config = json.loads(hub.repos[name].commits[hub.repos[name].branches["main"]]["config.json"])
        assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_name_without_its_owner(hub, tmp_path):
    """The card and the adapters' configs name the model as others find it."""
    model = tiny_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    prune_layers(
        adapted, remove=[1], output_dir=tmp_path / "out", push_to_hub=True, repo_id="small", token=TOKEN
    )  # fmt: skip
    sent = hub.repos["ada/small"].commits[hub.repos["ada/small"].branches["main"]]
    assert b'from_pretrained("ada/small")' in sent["README.md"]
    config = json.loads(sent["adapters/default/adapter_config.json"])
    assert config["base_model_name_or_path"] == "ada/small"


def test_a_hub_id_as_input(hub, tmp_path):
    base = tiny_folder(tmp_path / "base")
    store(hub, "ada/base", base)
    found = prune_layers("ada/base", remove=[3], output_dir=tmp_path / "out")
    assert_same_model(found, prune_layers(base, remove=[3]))
    assert docs("ada/base", kinds=["q"])["q"].tolist() == docs(base, kinds=["q"])["q"].tolist()


def test_a_branch(hub, pruned):
    sent = push_model(pruned, "small", revision="half", token=TOKEN, commit_message="Try it")
    repo = hub.repos["ada/small"]  # the token's own account
    assert sent.repo_id == "ada/small" and sent.url == f"{hub.endpoint}/ada/small/commit/{repo.branches['half']}"
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes"} and repo.messages[-1] == "Try it"
    assert tf.AutoModelForCausalLM.from_pretrained("ada/small", revision="half").config.num_hidden_layers == 3
    assert PruningPlan.from_pretrained("ada/small", revision="half").remove == (1,)


def test_a_dry_run_sends_nothing(hub, pruned):
    listed = push_model(pruned, "ada/small", token=TOKEN, dry_run=True)
    assert listed.url is None and listed.files == {name: len(data) for name, data in contents(pruned).items()}
    assert {method for method, _, _ in hub.requests} == {"GET"} and not hub.repos
    sent = push_model(pruned, "ada/small", token=TOKEN)
    assert sent.files == listed.files


def test_pushing_again_sends_nothing_new(hub, pruned):
    push_model(pruned, "ada/small", token=TOKEN)
    commits = dict(hub.repos["ada/small"].commits)
    hub.requests.clear()
    push_model(pruned, "ada/small", token=TOKEN)
    assert hub.repos["ada/small"].commits == commits and not any(m == "PUT" for m, _, _ in hub.requests)


def test_a_short_break_of_the_connection(hub, pruned):
    hub.cuts = 1
    push_model(pruned, "ada/small", token=TOKEN)
    assert_same_model(
        tf.AutoModelForCausalLM.from_pretrained("ada/small"), tf.AutoModelForCausalLM.from_pretrained(pruned)
    )


def test_a_cut_connection_leaves_no_commit_and_is_resumed(hub, tmp_path):
    folder = tmp_path / "shards"
    model = tiny_model("llama")
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = len(list(folder.glob("*.safetensors")))
    assert shards > 2
    hub.cut_after = 1
    with pytest.raises(HubError, match="connection failed.*Try again; what has arrived is not sent twice"):
        push_model(folder, "ada/shards", token=TOKEN)
    repo = hub.repos["ada/shards"]
    assert repo.messages == ["initial commit"] and len(hub.blobs) == 1
    hub.cut_after = None
    hub.requests.clear()
    push_model(folder, "ada/shards", token=TOKEN)
    assert repo.messages == ["initial commit", "Upload model"]
    assert sum(method == "PUT" for method, _, _ in hub.requests) == shards - 1
    assert_same_model(tf.AutoModelForCausalLM.from_pretrained("ada/shards"), model)


def test_somebody_else_pushes_meanwhile(hub, pruned):
    hub.before_commit = lambda repo: repo.commit("main", {"config.json": b"{}"}, "theirs")
    with pytest.raises(HubError, match="was changed meanwhile.*A commit has happened since"):
        push_model(pruned, "ada/small", token=TOKEN)
    assert hub.repos["ada/small"].messages == ["initial commit", "theirs"]


def test_another_model_is_not_overwritten(hub, pruned, tmp_path):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    repo = store(hub, "ada/theirs", tmp_path / "theirs")
    before = repo.commits[repo.branches["main"]]
    with pytest.raises(HubError, match="exists and holds another model.*model-00001-of-.*Nothing was sent"):
        prune_layers(tiny_model("llama"), remove=[1], output_dir=tmp_path / "out", push_to_hub=True, repo_id="ada/theirs", token=TOKEN)  # fmt: skip
    assert not (tmp_path / "out").exists()  # refused before the work
    with pytest.raises(HubError, match="exists and holds another model"):
        push_model(pruned, "ada/theirs", token=TOKEN)
    assert repo.commits[repo.branches["main"]] == before
    assert push_model(
        pruned, "ada/theirs", token=TOKEN, revision="small"
    ).delete  # a branch of its own leaves main alone
    assert repo.commits[repo.branches["main"]] == before
    assert tf.AutoModelForCausalLM.from_pretrained("ada/theirs", revision="small").config.num_hidden_layers == 3
    replaced = push_model(pruned, "ada/theirs", token=TOKEN, exist_ok=True)
    assert set(replaced.delete) == {name for name in before if "model-" in name or "index" in name}
    # The old shards are gone: nothing can load a mixture.
    assert_same_model(
        tf.AutoModelForCausalLM.from_pretrained("ada/theirs"), tf.AutoModelForCausalLM.from_pretrained(pruned)
    )
    # An earlier push of the same plan is replaced without asking, one of another plan is not.
    other = tmp_path / "other"
    prune_layers(tiny_model("llama"), remove=[2], output_dir=other)
    with pytest.raises(HubError, match="holds another model"):
        push_model(other, "ada/theirs", token=TOKEN)
    assert push_model(pruned, "ada/theirs", token=TOKEN).delete == ()


def refuse(message, action, folder):
    with pytest.raises(HubError, match=message) as caught:
        action()
    text, error = "", caught.value
    while error is not None:
        text, error = f"{text} {error}", error.__cause__ or error.__context__
    assert "hf_" not in text.replace("such as hf_…", "")  # not in the causes either, which a traceback shows
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "ada/small", "no token was found. Run `hf auth login`"),
        ("hf_wrong", "ada/small", "does not accept the token"),
        ("hf_wri\nter", "ada/small", "token= is not a token"),
        ("hf_wriтer", "ada/small", "token= is not a token"),
        (f"{TOKEN}\n", "ada/small", "token= is not a token: expected plain characters without spaces and line breaks"),
        ("hf_reader", "ada/small", "no permission to write to 'ada/small': it may only read"),
        ("hf_other", "ada/small", "no permission to write to 'ada/small': it belongs to eve"),
        (TOKEN, "ada/sm all", "that is no Hub id; expected 'user/name'"),
        (False, "ada/small", "Cannot use `token=False`"),
    ],
)
def test_refused_before_the_work(hub, token, repo_id, message, tmp_path):
    def prune():
        prune_layers(
            tiny_model("llama"), remove=[1], output_dir=tmp_path / "out", push_to_hub=True, repo_id=repo_id, token=token
        )

    refuse(message, prune, tmp_path)
    assert not hub.repos


@pytest.mark.parametrize("token", ["hf_wri\x0bter", "hf_wriтer", "hf_wri ter", b"hf_wri\xffter"])
@pytest.mark.parametrize("place", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file"])
def test_a_stored_token_that_cannot_be_sent_is_not_quoted(hub, place, token, pruned, tmp_path, monkeypatch):
    if place == "file":
        (hub.home / "token").write_bytes(token if isinstance(token, bytes) else token.encode())
    else:
        monkeypatch.setenv(place, os.fsdecode(token))
    message = (
        f"{re.escape(str(hub.home / 'token')) if place == 'file' else place} is not a token: expected plain characters"
    )
    for action in (
        lambda: push_model(pruned, "ada/small"),
        lambda: push_model(pruned, "ada/small", token=True),
        lambda: PruningPlan.from_pretrained("ada/small"),
        lambda: docs("ada/small"),
        lambda: prune_layers("ada/small", remove=[1]),
        lambda: prune_checkpoint("ada/small", remove=[1], output_dir=tmp_path / "out"),
    ):
        refuse(message, action, tmp_path)
    assert not hub.requests


def test_a_stored_token_that_nobody_needs_is_no_hindrance(hub, pruned, monkeypatch):
    store(hub, "ada/small", pruned)
    PruningPlan.from_pretrained("ada/small", token=False)
    monkeypatch.setenv("HF_TOKEN", "hf_wri\x0bter")
    assert push_model(pruned, "ada/small", token=TOKEN, dry_run=True).repo_id == "ada/small"
    assert PruningPlan.from_pretrained("ada/small", token=False).remove == (1,)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert PruningPlan.from_pretrained("ada/small").remove == (1,)


def test_permission_that_only_the_commit_shows(hub, pruned, tmp_path):
    """Fine-grained tokens do not tell beforehand what they may."""
    hub.tokens["hf_fine"] = ("ada", "fineGrained")
    refuse("no permission for that.*rights to create", lambda: push_model(pruned, "ada/a", token="hf_fine"), tmp_path)
    hub.repos["ada/a"] = Repo()
    hub.repos["ada/a"].commit("main", {}, "initial commit")
    refuse(
        "no permission for that.*required permissions", lambda: push_model(pruned, "ada/a", token="hf_fine"), tmp_path
    )
    assert hub.repos["ada/a"].messages == ["initial commit"] and not hub.blobs


def test_offline_and_unreachable(hub, pruned, tmp_path, monkeypatch):
    hub.shutdown()
    hub.server_close()
    refuse("connection failed.*ConnectError", lambda: push_model(pruned, "ada/small", token=TOKEN), tmp_path)
    refuse("Cannot read pruning_plan.json", lambda: PruningPlan.from_pretrained("ada/small"), tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse("offline mode is on", lambda: push_model(pruned, "ada/small", token=TOKEN), tmp_path)
    refuse("offline mode is on", lambda: PruningPlan.from_pretrained("ada/small"), tmp_path)


def test_bases_and_plans_that_cannot_be_read(hub, pruned, tmp_path):
    store(hub, "eve/gated", pruned, gated=True)
    store(hub, "eve/private", pruned, private=True)
    store(hub, "eve/plain", tiny_folder(tmp_path / "plain"))
    for name, message in (
        ("eve/gated", "gated"),
        ("eve/private", "private and the token may not read it"),
        ("eve/missing", "there is no such repository"),
        ("eve/plain", "has no such file"),
    ):
        with pytest.raises(HubError, match=message):
            PruningPlan.from_pretrained(name, token=TOKEN)
    with pytest.raises(HubError, match="no such revision"):
        PruningPlan.from_pretrained("eve/plain", revision="v9")
    with pytest.raises(LayerProbeError, match="no such file or folder, and it is no Hub id"):
        PruningPlan.from_pretrained("./missing/plan.json")
    result = CliRunner().invoke(app, ["prune", "eve/gated", "--remove", "1", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "gated" in result.stderr and not (tmp_path / "out").exists()


def test_a_folder_without_a_model(hub, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        LayerProbeError, match=r"holds no model: expected config.json and weights, found \['notes.txt'\]"
    ):
        push_model(tmp_path, "ada/small", token=TOKEN)


def test_a_model_instead_of_its_folder():
    with pytest.raises(LayerProbeError, match=r"folder is a LlamaForCausalLM; .*model.save_pretrained\(folder\)"):
        push_model(tiny_model("llama"), "ada/small")


def test_hidden_files_stay_at_home(hub, pruned, tmp_path):
    folder = tmp_path / "folder"
    for name, data in (contents(pruned) | {".env": b"secret", ".cache/x": b"x"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert push_model(folder, "ada/small", token=TOKEN).files.keys() == contents(pruned).keys()


def test_arguments_without_effect():
    with pytest.raises(LayerProbeError, match="private, repo_id would have no effect without push_to_hub=True"):
        prune_layers(tiny_model("llama"), remove=[1], private=True, repo_id="a/b")


def test_a_plan_made_for_another_model(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    plan = plan_pruning(model, remove=[1])
    with pytest.raises(
        PruningError, match=r"made for another model: the checksum .* or remove the same layers by name: remove=\[1\]"
    ):
        prune_layers(other, plan, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    for dtype in (torch.float16, torch.bfloat16, torch.float64):  # another dtype is not another model
        assert prune_layers(tiny_model("llama").to(dtype), plan).config.num_hidden_layers == 3


def test_the_commands_in_processes_of_their_own(hub, pruned, tmp_path):
    """As a user runs them: the endpoint, the token and the cache by environment variables."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip

    def run(*args):
        script = "from hf_layerprobe.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr
        return done.stdout

    store(hub, "ada/base", tiny_folder(tmp_path / "base"))
    assert json.loads(run("push", str(pruned), "ada/small", "--json"))["files"].keys() == contents(pruned).keys()
    assert hub.repos["ada/small"].messages[-1] == "Remove layers [1]"
    run("prune", "ada/base", "--plan", "ada/small", "--output", str(tmp_path / "out"))
    assert_same_model(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tf.AutoModelForCausalLM.from_pretrained(pruned)
    )
