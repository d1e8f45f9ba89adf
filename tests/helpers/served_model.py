# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A model to serve in tests, made without NeMo, and a server around it that runs in this process.

The model is the reference model with `mlp` exits at layers 3, 6 and 9 as conversion makes them: the layer's own MLP,
the final norm, the final output layer. Nothing is tuned, so low thresholds are needed for tokens to leave.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
REFERENCE_MODEL = ROOT / "assets" / "reference-model"
EXIT_LAYERS = (3, 6, 9)
EXITS = tuple(f"layer{layer}-mlp" for layer in EXIT_LAYERS)
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}# {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)
GOOD = {"model": "demo", "prompt": "import", "max_tokens": 2}  # a request that is answered


def write_exported_model(directory: Path) -> Path:
    """The directory that export_huggingface.py would write for the converted reference model."""
    from safetensors.torch import load_file, save_file

    directory.mkdir(parents=True)
    for path in REFERENCE_MODEL.glob("*.json"):
        shutil.copy(path, directory)
    tensors = {name: tensor.float() for name, tensor in load_file(REFERENCE_MODEL / "model.safetensors").items()}
    exits = []
    for layer, name in zip(EXIT_LAYERS, EXITS, strict=True):
        exits.append({"name": name, "layer": layer, "architecture": "mlp", "output": "shared"})
        for part in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            own = tensors[f"model.layers.{layer - 1}.{part}.weight"].clone()
            tensors[f"exit_heads.{name}.{part}.weight"] = own
        tensors[f"exit_heads.{name}.norm.weight"] = tensors["model.norm.weight"].clone()
    config = json.loads((REFERENCE_MODEL / "config.json").read_text(encoding="utf-8"))
    config |= {"early_exit": {"exits": exits}, "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors")
    return directory


def serve_config(path: Path, **changes: Any) -> dict[str, Any]:
    """conf/megatron_gpt_early_exit_serve.yaml as plain containers, with these changes."""
    config = yaml.safe_load((ROOT / "conf" / "megatron_gpt_early_exit_serve.yaml").read_text(encoding="utf-8"))
    del config["hydra"], config["defaults"]
    return {**config, "model": str(path), "name": "demo", "port": 0, "num_threads": 1, **changes}


@contextlib.contextmanager
def running(server: Any) -> Iterator[str]:
    """Serve in a thread on a free port; gives the address. Ends gracefully."""
    from nemo_ee.serving.serve import web_server

    web = web_server(server, 0, log_level="warning")
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    while not web.started:
        thread.join(0.02)
        assert thread.is_alive(), "the server did not start"
    try:
        port = web.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        web.should_exit = True
        thread.join(server.settings.shutdown_timeout + 20)
        assert not thread.is_alive(), "the server did not end"


def post(url: str, body: bytes | dict, path: str = "/v1/completions", **headers: str) -> tuple[int, dict]:
    """A request by hand: status and parsed body."""
    import http.client

    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request("POST", path, data, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def records(choice: Any) -> list[dict]:
    """What a choice says of its tokens."""
    return choice.early_exit["tokens"]
