# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The Python files of `hf_early_exit/`: the runtime and the engine, copied, for `trust_remote_code=True`.

transformers runs a directory's code from files beside config.json. They are copies of this package at the time of the
export: `nemo_ee.runtime.auto_model` and all modules of nemo_ee that it imports, with relative imports among them, and
one small file with the classes. They are subclasses of the stock ones: `from_pretrained`, `save_pretrained` and
`generate` are those of the installed transformers, and other models of the family load as before.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from nemo_ee.families.family import Family

ROOT_MODULE = "nemo_ee.runtime.auto_model"
MODELING = "modeling_early_exit"
LICENCE = "LICENSE.early_exit_code"  # licence of the code; the weights have another
_IMPORT = re.compile(r"^(\s*)from (nemo_ee(?:\.\w+)+) import", re.MULTILINE)

_TEMPLATE = '''# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A {family} with early exits for transformers 4.51 to 5.x. Written by nemo_ee's export, as are the files beside it.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    model.generate(**tokenizer(text, return_tensors="pt"), early_exit_threshold=0.8)
"""

from transformers import AutoTokenizer, PreTrainedTokenizerFast, {config}, {model}

from .{root} import EarlyExitGeneration, PortableConfig

# transformers copies only files that this file imports.
{others}


class EarlyExitConfig(PortableConfig, {config}):
    """The stock config; `early_exit` in it is the table of exits."""

    _auto_class = "AutoConfig"  # transformers before 4.53 saves the files of a class only if it says so


class EarlyExitForCausalLM(EarlyExitGeneration, {model}):
    """The stock model with exits; see `generate`."""

    config_class = EarlyExitConfig
    _auto_class = "AutoModelForCausalLM"


# `pipeline` of transformers 4.51 loads a tokenizer only for registered configs. The class is that of the
# directory's tokenizer_config.json in any case.
AutoTokenizer.register(EarlyExitConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
'''


def auto_map() -> dict[str, str]:
    """The keys of config.json that name the classes."""
    return {"AutoConfig": f"{MODELING}.EarlyExitConfig", "AutoModelForCausalLM": f"{MODELING}.EarlyExitForCausalLM"}


def remote_code(family: Family) -> dict[str, str]:
    """File name -> text of everything a directory of this family needs, with the licence of the code."""
    files, waiting = {}, [ROOT_MODULE]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name in files:
            continue
        text = Path(find_spec(module).origin).read_text(encoding="utf-8")
        waiting += [match[2] for match in _IMPORT.finditer(text)]
        files[name] = _IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import", text)
    root = _flat(ROOT_MODULE)
    stems = sorted(name.removesuffix(".py") for name in files if name != f"{root}.py")
    others = "\n".join(f"from .{stem} import __name__ as _" for stem in stems)
    files[f"{MODELING}.py"] = _TEMPLATE.format(
        family=family.model_type, config=family.config_class, model=family.model_class, root=root, others=others
    )
    licence = _licence()
    if licence is not None:
        files[LICENCE] = licence
    return dict(sorted(files.items()))


def _licence() -> str | None:
    """The licence's text from the installed package, or from its source tree."""
    try:
        installed = distribution("nemo_ee")
        text = installed.read_text("licenses/LICENSE") or installed.read_text("LICENSE")
    except PackageNotFoundError:
        text = None
    beside = Path(find_spec("nemo_ee").origin).parents[1] / "LICENSE"
    if text is None and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    return text


def _flat(module: str) -> str:
    """File name of a module: `nemo_ee.runtime.model` -> `early_exit_runtime_model`."""
    return "early_exit_" + module.removeprefix("nemo_ee.").replace(".", "_")
