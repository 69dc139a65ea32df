"IDs go to the Hub and come back the same, from a server of the tests' own; what goes wrong is one sentence."
import base64
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from huggingface_hub import constants

from spatialid import hub
from spatialid.extraction import SpatialIDs

TOKEN = "hf_writer"


class Hub(ThreadingHTTPServer):
    "Repositories in memory: {id: [{path: bytes}, one for each commit]}."
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.url = {}, f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, args=(.02,), daemon=True).start()

    def at(self, repo, revision):
        "(name of the commit, its files), None for a revision that is not there."
        names = {f"{i:040x}": files for i, files in enumerate(self.repos[repo])}
        wanted = [*names][-1] if revision == "main" else revision
        return (wanted, names[wanted]) if wanted in names else None


class Answer(BaseHTTPRequestHandler):
    "What the Hub says to those of its client's requests that IDs need."
    def log_message(self, *words): pass

    def say(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.say(403 if self.headers["Authorization"] == "Bearer hf_reader" else 401, {"error": "no"})
        if self.path == "/api/repos/create": return self.create(json.loads(text))
        repo, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path).groups()
        if what == "preupload":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(text)["files"]]
            return self.say(200, {"files": files})
        lines = [json.loads(line) for line in text.decode().splitlines()]
        new = {o["value"]["path"]: base64.b64decode(o["value"]["content"]) for o in lines if o["key"] == "file"}
        self.server.repos[repo].append({**self.server.at(repo, "main")[1], **new})
        self.say(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{self.server.at(repo, 'main')[0]}",
                       "commitOid": self.server.at(repo, "main")[0]})

    def create(self, asked):
        repo = f"{asked.get('organization', 'me')}/{asked['name']}"
        there = repo in self.server.repos
        self.server.repos.setdefault(repo, [{}])
        self.say(409 if there else 200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def do_GET(self):
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", self.path)
        if asked is None: return self.say(404, X_Error_Code="RepoNotFound") # about a repository that is not there
        repo, revision, path = asked.groups()
        if repo == "me/broken": return self.say(500, X_Error_Message="out of order")
        if repo == "me/gated": return self.say(403, X_Error_Code="GatedRepo")
        if repo not in self.server.repos: # or closed to whoever asks
            return self.say(404 if self.headers["Authorization"] else 401, X_Error_Code="RepoNotFound")
        found = self.server.at(repo, revision)
        if found is None: return self.say(404, X_Error_Code="RevisionNotFound")
        if path not in found[1]: return self.say(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
        data = found[1][path]
        self.say(200, data, X_Repo_Commit=found[0], ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A Hub that the client takes for the real one, an empty cache, and a token that may write."
    server = Hub()
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path/"cache"),
                        "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
                        "HF_TOKEN_PATH": str(tmp_path/"token")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def some_ids(seed=0, slot="first"):
    g = np.random.default_rng(seed)
    origin = {"model": "a/b", "revision": "1234", "weight_hash": "1234", "params": {"images": 32}}
    return SpatialIDs(g.normal(size=(1, 1, 2, 4, 4, 8)).astype(np.float32), np.full((1, 1, 4, 4), 2), ["star"], [74],
                      [1, 2], [("cup", "star")], "Is the {subject} left of the {object}?", provenance=origin, slot=slot)


def test_what_is_pushed_comes_back_with_its_card(server):
    ids, second = some_ids(), some_ids(1, "second")
    assert ids.push_to_hub("me/ids") == f"{server.url}/me/ids/commit/{1:040x}"
    second.push_to_hub("me/ids", private=True) # beside the other slot
    for made, back in ((ids, SpatialIDs.from_hub("me/ids")), (second, SpatialIDs.from_hub("me/ids", slot="second"))):
        assert np.array_equal(made.table, back.table) and np.array_equal(made.counts, back.counts)
        assert (back.pairs, back.slot, back.provenance) == (made.pairs, made.slot, made.provenance)
    files = server.repos["me/ids"][-1]
    assert files.keys() == {"spatial_ids.safetensors", "spatial_ids.json", "spatial_ids_second.safetensors",
                            "spatial_ids_second.json"}
    card = json.loads(files["spatial_ids.json"])
    assert (card["model"], card["weight_hash"], card["images"]) == ("a/b", "1234", 32)
    assert (card["cells"], card["width"], card["layers"]) == ([4, 4], 8, [1, 2])
    assert card["sha256"] == hashlib.sha256(files[card["file"]]).hexdigest()


def test_a_revision_is_what_was_pushed_then(server):
    first, then = some_ids(0), some_ids(1)
    for ids in (first, then): ids.push_to_hub("me/ids")
    assert np.array_equal(SpatialIDs.from_hub("me/ids").table, then.table)
    assert np.array_equal(SpatialIDs.from_hub("me/ids", revision=f"{1:040x}").table, first.table)


def test_what_was_fetched_is_read_without_a_network(server, monkeypatch):
    ids = some_ids()
    ids.push_to_hub("me/ids")
    SpatialIDs.from_hub("me/ids")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert np.array_equal(SpatialIDs.from_hub("me/ids").table, ids.table)


def sentence(kind, call, *args, **kwargs):
    with pytest.raises(kind) as error: call(*args, **kwargs)
    assert "\n" not in str(error.value) and type(error.value) is kind
    return str(error.value)


def test_what_is_not_there_is_named(server):
    some_ids().push_to_hub("me/ids")
    assert "no repository me/none, or it is private" in sentence(FileNotFoundError, SpatialIDs.from_hub, "me/none")
    message = sentence(FileNotFoundError, SpatialIDs.from_hub, "me/ids", revision="v9")
    assert message == "me/ids has no revision 'v9': give a branch, a tag or a commit of it"
    message = sentence(FileNotFoundError, SpatialIDs.from_hub, "me/ids", slot="second")
    assert message.startswith("me/ids has no spatial_ids_second.json: give a repository, and a slot")
    assert "slot must be 'first'" in sentence(ValueError, SpatialIDs.from_hub, "me/ids", slot="third")
    for call in (SpatialIDs.from_hub, some_ids().push_to_hub):
        assert "names no repository: give owner/name" in sentence(ValueError, call, "me/my ids")


@pytest.mark.parametrize("damage, said", [
    (lambda files: files.update({"spatial_ids.safetensors": b"other"}), "is not the file that its card describes"),
    (lambda files: files.update({"spatial_ids.json": b"{"}), "is no card of spatial IDs"),
    (lambda files: files.update({"spatial_ids.json": b"{}"}), "is no card of spatial IDs")])
def test_another_file_does_not_pass_for_ids(server, damage, said):
    some_ids().push_to_hub("me/ids")
    damage(server.repos["me/ids"][-1])
    assert said in sentence(ValueError, SpatialIDs.from_hub, "me/ids")


def test_who_may_not_is_told_how(server, monkeypatch):
    assert "me/gated is gated: accept its terms" in sentence(PermissionError, SpatialIDs.from_hub, "me/gated")
    push = some_ids().push_to_hub
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "with the right to write there" in sentence(PermissionError, push, "me/ids")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not know this token" in sentence(PermissionError, push, "me/ids")
    monkeypatch.delenv("HF_TOKEN")
    assert sentence(PermissionError, push, "me/ids").startswith("writing to me/ids needs a token: log in with `hf auth")
    assert "it is private: check the name" in sentence(FileNotFoundError, SpatialIDs.from_hub, "me/none")
    assert not server.repos, "nothing was made"


def test_without_an_answer_it_says_to_go_online(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None) # between the client's tries
    push = some_ids().push_to_hub
    assert "me/broken" in sentence(ConnectionError, SpatialIDs.from_hub, "me/broken")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (SpatialIDs.from_hub, push):
        message = sentence(ConnectionError, call, "me/ids")
        assert "the Hub was not reached for me/ids" in message and "go online" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.shutdown(), server.server_close()
    for call in (SpatialIDs.from_hub, push): assert "go online" in sentence(ConnectionError, call, "me/ids")


def test_an_answer_that_is_no_result_is_not_called_a_lack_of_network():
    class Failed(OSError): response = type("Response", (), {"status_code": 503})
    assert "could not do this with a/b (busy): try again later" in str(hub.explained(Failed("busy"), "a/b"))
