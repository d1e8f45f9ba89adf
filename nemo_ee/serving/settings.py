# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""conf/megatron_gpt_early_exit_serve.yaml, read once; every fault that needs no weights, in one message."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.members import CONFIG_MEMBER
from nemo_ee.generation.cost_rule import COST_RULES, unknown_cost_rule
from nemo_ee.generation.policy import MODES, ExitPolicy
from nemo_ee.serving.exit_choice import ExitChoice
from nemo_ee.serving.protocol import Limits
from nemo_ee.text.text_files import TextError, read_document

KEYS_VARIABLE = "NEMO_EE_API_KEYS"
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class HttpSettings:
    """The server's side that faces the network.

    Attributes:
        host, port: to listen on; port 0 = a free one.
        api_keys: any of which lets a request in; none = no key is asked for.
        limits: of one request.
        max_body_bytes: of a request, counted before it is parsed.
        max_connections: open at a time.
        request_timeout: seconds from a request to the end of its answer.
        shutdown_timeout: seconds that running answers get when the server is told to stop.
    """

    host: str
    port: int
    api_keys: tuple[str, ...]
    limits: Limits
    max_body_bytes: int
    max_connections: int
    request_timeout: float
    shutdown_timeout: float


@dataclass(frozen=True)
class ServerSettings:
    """Everything the server is started with.

    Attributes:
        http: see `HttpSettings`.
        path: directory of the model.
        name: what requests call it.
        chat_template: text of one that replaces the tokenizer's, or None.
        device, dtype, num_threads: where and in what the model computes; None = its dtype, torch's threads.
        default: mode and policy of requests that do not say.
        num_slots: sequences decoded at a time.
        max_length: most tokens of a sequence, or None = the model's positions.
        max_queue: most sequences that wait for a slot.
        cost_rule: one of `COST_RULES`.
    """

    http: HttpSettings
    path: Path
    name: str
    chat_template: str | None
    device: str
    dtype: str | None
    num_threads: int | None
    default: ExitChoice
    num_slots: int
    max_length: int | None
    max_queue: int
    cost_rule: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ServerSettings:
        """Read the config.

        Args:
            config: the script's config as plain containers.

        Raises:
            ValueError: every fault, in one message.
        """
        faults: list[str] = []
        least = {"port": 0, "num_slots": 1, "max_queue": 0, "max_new_tokens": 1, "max_choices": 1,
                 "max_body_bytes": 1024, "max_connections": 1}  # fmt: skip
        for key, lowest in least.items():
            _check_whole(config, key, lowest, faults)
        for key in ("max_length", "num_threads"):
            if config[key] is not None:
                _check_whole(config, key, 1, faults)
        for key in ("request_timeout", "shutdown_timeout"):
            value = config[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                faults.append(f"{key}={value!r} must be a number of seconds above 0")
        if not faults and config["max_choices"] > config["max_queue"] + config["num_slots"]:
            faults.append(
                f"max_choices={config['max_choices']} answers of one request never fit into max_queue="
                f"{config['max_queue']} + num_slots={config['num_slots']}; lower it, or raise one of those"
            )
        path = _path(config, faults)
        keys = _keys(config["api_keys_file"], faults)
        _check_host(str(config["host"]), keys, faults)
        default = _default(config, faults)
        if config["cost_rule"] not in COST_RULES:
            faults.append(unknown_cost_rule(config["cost_rule"]))
        template = _template(config["chat_template"], faults)
        if faults:
            raise ValueError("the server was not started:\n" + "\n".join(f"  {one}" for one in faults))
        http = HttpSettings(
            host=str(config["host"]),
            port=config["port"],
            api_keys=keys,
            limits=Limits(config["max_new_tokens"], config["max_choices"]),
            max_body_bytes=config["max_body_bytes"],
            max_connections=config["max_connections"],
            request_timeout=config["request_timeout"],
            shutdown_timeout=config["shutdown_timeout"],
        )
        return cls(
            http=http,
            path=path,
            name=str(config["name"] or path.resolve().name),
            chat_template=template,
            device=str(config["device"]),
            dtype=config["dtype"],
            num_threads=config["num_threads"],
            default=default,
            num_slots=config["num_slots"],
            max_length=config["max_length"],
            max_queue=config["max_queue"],
            cost_rule=config["cost_rule"],
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, out of others' reach."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host[1:-1] if host[:1] + host[-1:] == "[]" else host).is_loopback
    except ValueError:
        return False


def _check_whole(config: Mapping[str, Any], key: str, least: int, faults: list[str]) -> None:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        faults.append(f"{key}={value!r} must be a whole number from {least}")
    elif key == "port" and value > 65535:
        faults.append(f"port={value} must be at most 65535")


def _path(config: Mapping[str, Any], faults: list[str]) -> Path:
    given = config["model"]
    if given in (None, "???", ""):
        faults.append("model is not set; give hf_early_exit/ of an export (scripts/export/export_huggingface.py)")
        return Path()
    path = Path(str(given))
    if path.suffix == ".nemo" or (path / CONFIG_MEMBER).is_file():
        faults.append(
            f"model={path} is a NeMo checkpoint, which is not served as it is; run scripts/export/"
            f"export_huggingface.py checkpoint={path} output=export and give export/hf_early_exit"
        )
    elif (path / "hf_early_exit").is_dir():
        faults.append(f"model={path} is a whole export; give {path / 'hf_early_exit'}")
    elif not path.is_dir():
        faults.append(f"model={path} is not a directory; give hf_early_exit/ of an export")
    return path


def _keys(file: Any, faults: list[str]) -> tuple[str, ...]:
    """API keys from the file, one a line, and from the environment, separated by commas."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = read_document(Path(str(file))).splitlines()
            keys += [line.strip() for line in lines if not line.lstrip().startswith("#")]
        except TextError as fault:
            faults.append(f"api_keys_file={file} cannot be read ({fault}); give a text file with one key a line")
    keys = [key for key in keys if key]
    if any(len(key) < _SHORTEST_KEY or not key.isascii() for key in keys):
        faults.append(f"an API key is shorter than {_SHORTEST_KEY} characters or not ASCII; make a longer one")
    if file is not None and not keys:
        faults.append(f"api_keys_file={file} holds no key; write one a line")
    return tuple(dict.fromkeys(keys))


def _check_host(host: str, keys: tuple[str, ...], faults: list[str]) -> None:
    if not keys and not is_loopback(host):
        faults.append(
            f"host={host} can be reached from other machines, and no API key is set; put keys into {KEYS_VARIABLE} or "
            "api_keys_file, or listen on 127.0.0.1"
        )


def _default(config: Mapping[str, Any], faults: list[str]) -> ExitChoice | None:
    if config["mode"] not in MODES:
        faults.append(f"mode={config['mode']!r} is unknown; use one of {', '.join(MODES)}")
    try:
        policy = ExitPolicy(
            config["threshold"],
            criterion=config["criterion"],
            active=config["exits"],
            max_pending_tokens=config["max_pending_tokens"],
            num_draft_tokens=config["num_draft_tokens"],
        )
    except (ValueError, TypeError) as fault:
        faults.append(str(fault))
        return None
    return ExitChoice(config["mode"], policy)


def _template(file: Any, faults: list[str]) -> str | None:
    if file is None:
        return None
    try:
        return read_document(Path(str(file)))
    except TextError as fault:
        faults.append(f"chat_template={file} cannot be read ({fault}); give a Jinja template")
        return None
