"""What is handed over: the type of the weights, a GGUF file, an upload. The hub is a small server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from safetensors.torch import load_file

from holdfast.errors import HoldfastError, PlanError, RecipeError, TrainingError
from holdfast.runs import handover
from holdfast.verbs.tune import tune
from tiny_run import recipe_data, write_recipe

LORA = [{"LoRA": {"r": 2}}]


def written(world, out, **changes):
    """A recipe file for a short run into `out`."""
    training = {"max_steps": 3, **changes.pop("training", {})}
    data = recipe_data(world, out, training=training, **{"plan": LORA, **changes})
    return write_recipe(out.parent / f"{out.name}.yaml", data)


# ---- the type of the weights


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("plan, merge", [([], False), (LORA, True), (LORA, False)], ids=["dense", "merged", "adapter"])
def test_weights_have_the_asked_type(world, tmp_path, name, plan, merge):
    """The export check of the run itself compares what was written with the model in memory."""
    tune(written(world, tmp_path / "run", plan=plan, export={"dtype": name, "merge": merge}))
    (file,) = (tmp_path / "run" / "model").glob("*.safetensors")
    assert {str(v.dtype) for v in load_file(file).values()} == {f"torch.{name}"}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "its logits equal the trained model's" in report["tuned"]["export"]
    assert report["model"]["dtype"] == ("float32" if plan and not merge else name)


def test_a_run_that_goes_on_measures_what_it_wrote(world, tmp_path):
    path = written(world, tmp_path / "run", plan=[], export={"dtype": "bfloat16"})
    tune(path)
    before = (tmp_path / "run" / "after.json").read_text()
    for name in ("after.json", "report.json"):
        (tmp_path / "run" / name).unlink()
    tune(path)
    assert (tmp_path / "run" / "after.json").read_text() == before


def test_a_weight_that_does_not_fit_is_told(tiny_model):
    from holdfast.runs.export import round_to

    model = tiny_model()
    model.lm_head.weight.data[0, 0] = 1e6
    job = SimpleNamespace(recipe=SimpleNamespace(export=SimpleNamespace(dtype="float16")))
    with pytest.raises(TrainingError, match="too large for export"):
        round_to(job, model)


# ---- GGUF


def refused(path: Path, kind: type[HoldfastError], match: str) -> None:
    """The recipe is refused before anything is measured or trained."""
    with pytest.raises(kind, match=match):
        tune(path)
    assert not [p for p in path.with_suffix("").glob("*.json") if p.name != "recipe.yaml"]


def test_without_llama_cpp_nothing_begins(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(handover.HOME, raising=False)
    cure = "git clone https://github.com/ggml-org/llama.cpp, and set LLAMA_CPP"
    refused(written(world, tmp_path / "one", plan=[], export={"gguf": True}), RecipeError, "not on PATH")
    refused(written(world, tmp_path / "two", plan=[], export={"gguf": "/no/where"}), RecipeError, cure)
    monkeypatch.setenv(handover.HOME, str(tmp_path))
    refused(written(world, tmp_path / "three", plan=[], export={"gguf": True}), RecipeError, f"not in {tmp_path}")


def test_an_adapter_is_no_gguf(world, tmp_path):
    (tmp_path / handover.CONVERTER).touch()
    path = written(world, tmp_path / "run", export={"gguf": str(tmp_path)})
    refused(path, PlanError, "LoRA leaves weights of its own")


def test_a_soft_prompt_is_no_gguf(world, tmp_path):
    """The file would be the bare base."""
    (tmp_path / handover.CONVERTER).touch()
    for n, plan in enumerate(({"PromptTuning": {"num_virtual_tokens": 2}}, {"ProMoT": {"num_virtual_tokens": 2}})):
        path = written(world, tmp_path / f"run{n}", plan=[plan], export={"gguf": str(tmp_path)})
        refused(path, PlanError, "leaves a soft prompt, which a GGUF file does not hold")


@pytest.mark.parametrize("place", ["folder", "script", "environment", "PATH"])
def test_the_converter_is_found_and_called_rightly(tmp_path, monkeypatch, place):
    """llama.cpp is not installed where tests run, so the command line is looked at, against its usage text."""
    script, folder = tmp_path / handover.CONVERTER, tmp_path / "model"
    script.touch(mode=0o755)
    folder.mkdir()
    monkeypatch.delenv(handover.HOME, raising=False)
    if place == "environment":
        monkeypatch.setenv(handover.HOME, str(tmp_path))
    if place == "PATH":
        monkeypatch.setenv("PATH", str(tmp_path))
    gguf = {"folder": str(tmp_path), "script": str(script)}.get(place, True)
    found = handover.converter(SimpleNamespace(export=SimpleNamespace(gguf=gguf)))
    for dtype, kind in (("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16"), (None, "auto")):
        (folder / "config.json").write_text(json.dumps({"dtype": dtype}))
        told = handover.command_line(found, folder, tmp_path / "x.gguf")
        assert told[1:] == [str(script.resolve()), str(folder), "--outfile", str(tmp_path / "x.gguf"),
                            "--outtype", kind]  # fmt: skip


def test_a_failed_conversion_loses_nothing(world, tmp_path):
    """An empty script ends well and writes nothing, as one of another version might."""
    (tmp_path / handover.CONVERTER).touch()
    path = written(world, tmp_path / "run", plan=[], export={"gguf": str(tmp_path)})
    for _ in range(2):  # the second time nothing but the conversion is tried
        with pytest.raises(TrainingError, match=r"it wrote no file\nNothing is lost.*by hand: .*convert_hf_to_gguf"):
            tune(path)
    assert (tmp_path / "run" / "report.json").is_file() and not (tmp_path / "run" / "model.gguf").exists()


# ---- the hub


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to an upload of small files; it keeps what it is told."""

    def answer(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(self.path)
        private = self.server.private
        self.answer({"id": "me/mine", "private": private, "siblings": [], "tags": [], "sha": "0" * 40})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        self.server.tokens.add(self.headers.get("authorization"))
        if self.server.broken:
            return self.answer({"error": "out of order"}, 500 if "commit" in self.path else 200)
        if self.path.endswith("/repos/create"):
            self.server.created = json.loads(body)
            return self.answer({"url": "https://huggingface.co/me/mine", "name": "me/mine"})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.files = {line["value"]["path"] for line in lines if line["key"] == "file"}
        url = "https://huggingface.co/me/mine/commit/abc"
        return self.answer({"commitUrl": url, "commitOid": "abc", "success": True})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.tokens, server.files, server.created = [], set(), set(), None
    server.private, server.broken = True, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def made_private(hub):
    """Older versions of huggingface_hub say it by another name."""
    return hub.created.get("visibility") == "private" or hub.created.get("private") is True


def test_the_tuned_model_is_uploaded_once(world, tmp_path, hub):
    path = written(world, tmp_path / "run", export={"push_to_hub": "me/mine"})
    tune(path)
    assert hub.created["name"] == "mine" and made_private(hub)
    assert hub.tokens == {"Bearer hf_secret"}
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= hub.files
    assert json.loads((tmp_path / "run" / "pushed.json").read_text()) == {"repo": "me/mine", "commit": "abc"}
    hub.asked.clear()
    tune(path)
    assert not hub.asked


def test_a_failed_upload_loses_nothing(world, tmp_path, hub):
    hub.broken = True
    path = written(world, tmp_path / "run", export={"push_to_hub": "me/mine"})
    with pytest.raises(TrainingError, match=r"failed.*\nNothing is lost.*hf upload me/mine .*model"):
        tune(path)
    report = (tmp_path / "run" / "report.json").stat().st_mtime_ns
    hub.broken = False
    tune(path)
    assert hub.files and (tmp_path / "run" / "report.json").stat().st_mtime_ns == report


def test_nothing_private_goes_to_a_public_repository(world, tmp_path, hub):
    hub.private = False
    path = written(world, tmp_path / "run", export={"push_to_hub": "me/mine"})
    with pytest.raises(TrainingError, match="exists and is public"):
        tune(path)
    assert not hub.files
    tune(written(world, tmp_path / "open", export={"push_to_hub": "me/mine", "hub_private_repo": False}))
    assert hub.files and not made_private(hub)


def test_an_upload_that_cannot_be_is_refused_first(world, tmp_path, hub, monkeypatch):
    refused(written(world, tmp_path / "a", export={"push_to_hub": "a b/c"}), RecipeError, "no name of a repository")
    prompts = [{"ProMoT": {"num_virtual_tokens": 3}}]
    path = written(world, tmp_path / "b", plan=prompts, export={"push_to_hub": "me/mine"})
    refused(path, PlanError, "ProMoT leaves a soft prompt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(written(world, tmp_path / "c", export={"push_to_hub": "me/mine"}), RecipeError, "HF_HUB_OFFLINE is set")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused(written(world, tmp_path / "d", export={"push_to_hub": "me/mine"}), RecipeError, "hf auth login")
    assert not hub.asked
