# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The two TensorRT-LLM model files, on eager stand-ins of the API they use, against `kv: propagate` of the runtime.

The stand-ins (tests/helpers/tensorrt_llm_stand_in.py, tensorrt_llm_torch_stand_in.py and
tensorrt_llm_executor_stand_in.py) are not TensorRT-LLM; what is shown here is that the files compute what they say,
not that TensorRT-LLM loads them. Both load exports of the same `.nemo` as the runtime does. Tokens and exits exactly,
logits within 1e-5 of the largest, fp32. The tests of the PyTorch backend's file run on the API of 1.0 to 1.2 and on
that of 1.3 and 1.4.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import exit_entry

import torch  # isort: skip  # after the CPU host is on

from nemo_ee.exits.confidence import confidence
from nemo_ee.exits.criteria import OF_LOGITS
from nemo_ee.families.registry import FAMILIES
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model
from nemo_ee.runtime.propagation import PropagatingBatch, generate_propagating
from tests.functional import test_export_huggingface, test_export_tensorrt_llm
from tests.helpers import tensorrt_llm_executor_stand_in, tensorrt_llm_stand_in, tensorrt_llm_torch_stand_in
from tests.helpers.huggingface_models import change_config

EXITS = [
    exit_entry(1, "mlp", "random"),
    exit_entry(1, "norm", "copy", "low_rank", rank=2),
    exit_entry(2, "embedding", output="shared"),
    exit_entry(2, "mlp", "copy", "shared"),
    exit_entry(2, "layer", "copy"),
]
ASKED = [exit["name"] for exit in EXITS if exit["architecture"] != "layer"]
PROMPTS = [[5, 71, 13, 9, 0, 44], [3, 8], [100, 99, 98, 97]]
NEW_TOKENS = [14, 9, 18]
TOLERANCE = 1e-5
ENGINE_CLASSES = {
    "llama": "EarlyExitLlamaForCausalLM", "llama-tied": "EarlyExitLlamaForCausalLM",
    "llama-bias": "EarlyExitLlamaForCausalLM", "mistral": "EarlyExitLlamaForCausalLM",
}  # fmt: skip
ENGINE_CLASSES |= {
    name: family.engine.early_exit
    for name, family in FAMILIES.items()
    if name not in ENGINE_CLASSES and family.engine is not None and family.engine.early_exit is not None
}


class Exported:
    """One `.nemo` exported for both backends, and the reference decoder on it."""

    def __init__(self, folder: Path, name: str) -> None:
        one = test_export_huggingface.Made(folder, name, EXITS)
        self.path = one.path
        self.trt = test_export_tensorrt_llm.export(one.path, folder / "trt", drafts=())
        self.hf = test_export_huggingface.export(one.path, folder / "hf_out", targets=("early_exit",))
        self.model = load_model(self.hf / "hf_early_exit")
        self.exits, self.engine_class = one.exits, ENGINE_CLASSES[name]

    def thresholds(self, criterion: str, quantile: float) -> dict[str, float]:
        """Per exit the value that this share of its confidences on random text lies below."""
        return {name: confidence(self.exits[name], criterion).flatten().quantile(quantile).item() for name in ASKED}

    def engine_session(self, **early_exit: Any) -> tensorrt_llm_stand_in.Session:
        """As trtllm-build does it: run the file under the name `models`, take the class, load the checkpoint."""
        folder = self.trt / "trtllm_ckpt"
        set_early_exit(folder, mark_exit_index=True, **early_exit)
        module = SourceFileLoader("models", str(self.trt / "tensorrt_llm_model.py")).load_module()
        return tensorrt_llm_stand_in.Session(getattr(module, self.engine_class), folder)

    def torch_session(
        self,
        *,
        settings: dict | None = None,
        mapping: dict | None = None,
        trust_remote_code: bool = True,
        **early_exit: Any,
    ) -> tensorrt_llm_executor_stand_in.Session:
        """As --custom_module_dirs does it: import a package, which registers its classes; load the directory.

        Args:
            settings: the user's; None = the documented serve.yaml for 1.2, nothing for 1.4.
        """
        set_early_exit(self.hf / "hf_early_exit", **early_exit)
        sys.path.insert(0, str(self.hf / "hf_early_exit"))
        try:
            sys.modules.pop("early_exit_trtllm", None)
            file = importlib.import_module("early_exit_trtllm")
        finally:
            sys.path.pop(0)
        if settings is None:
            settings = file.DEFAULTS if tensorrt_llm_torch_stand_in.api == "1.2" else {}
        return tensorrt_llm_executor_stand_in.Session(
            self.hf / "hf_early_exit", settings, trust_remote_code=trust_remote_code, **mapping or {}
        )


def model_file(name: str) -> Path:
    return Path(importlib.util.find_spec(f"nemo_ee.export.tensorrt_llm.files.{name}").origin)


def set_early_exit(folder: Path, **values: Any) -> None:
    block = json.loads((folder / "config.json").read_text())["early_exit"]
    for key in ("thresholds", "criterion"):
        block.pop(key, None)
    change_config(folder, early_exit=block | values)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """name -> `Exported`, each made once."""
    kept: dict[str, Exported] = {}

    def of(name: str) -> Exported:
        if name not in kept:
            kept[name] = Exported(tmp_path_factory.mktemp(name), name)
        return kept[name]

    return of


@pytest.fixture
def stand_in() -> Iterator[Any]:
    with tensorrt_llm_stand_in.installed():
        tensorrt_llm_stand_in.counts.clear()
        yield tensorrt_llm_stand_in


@pytest.fixture(params=tensorrt_llm_executor_stand_in.VERSIONS)
def torch_stand_in(request: pytest.FixtureRequest) -> Iterator[Any]:
    with tensorrt_llm_executor_stand_in.installed(request.param):
        tensorrt_llm_torch_stand_in.counts.clear()
        tensorrt_llm_torch_stand_in.lines.clear()
        yield tensorrt_llm_torch_stand_in


def serve(step: Any, names: list[str]) -> tuple[list[list[int]], list[list[str | None]]]:
    """Greedy decoding of PROMPTS; a sequence that has its tokens leaves the batch.

    Args:
        step: sequence -> (first position, tokens) to (index into `names` or len(names), logits `[sequences, v]`).
    """
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    exits: list[list[str | None]] = [[] for _ in PROMPTS]
    feed = {sequence: (0, list(prompt)) for sequence, prompt in enumerate(PROMPTS)}
    while feed:
        index, logits = step(feed)
        for sequence, token in zip(feed, logits.argmax(-1).tolist(), strict=True):
            tokens[sequence].append(token)
            exits[sequence].append([*names, None][index])
        feed = {
            s: (first + len(own), tokens[s][-1:]) for s, (first, own) in feed.items() if len(tokens[s]) < NEW_TOKENS[s]
        }
    return tokens, exits


def in_order(one: Exported) -> list[str]:
    return [exit.name for exit in one.model.exits if exit.name in ASKED]


# -- engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["max_probability", "entropy"])
@pytest.mark.parametrize("name", ENGINE_CLASSES)
def test_the_engine_file_gives_the_tokens_and_exits_of_the_runtime(
    name: str, criterion: str, exported, stand_in
) -> None:
    one, used = exported(name), set()
    for quantile in (0.1, 0.4, 0.7, 0.9):
        thresholds = one.thresholds(criterion, quantile)
        session = one.engine_session(thresholds=thresholds, criterion=criterion)

        def step(feed: Any, session=session) -> tuple[int, torch.Tensor]:
            outputs = session.step(feed)
            assert outputs.keys() == {"logits", "early_exit_index"}
            return int(outputs["early_exit_index"]), outputs["logits"]

        policy = ExitPolicy(thresholds, criterion, active=tuple(ASKED))
        expected = generate_propagating(one.model, PROMPTS, max_new_tokens=NEW_TOKENS, policy=policy)
        tokens, exits = serve(step, in_order(one))
        assert [tuple(own) for own in tokens] == list(expected.tokens)
        assert [tuple(own) for own in exits] == list(expected.exits)
        used |= {exit for own in exits for exit in own}
    assert len(used) >= 2 and None in used, "control: some steps leave and some do not"


def test_an_engine_skips_the_mlps_past_the_exit_and_nothing_before(exported, stand_in) -> None:
    one, name = exported("llama"), ASKED[0]
    session = one.engine_session(thresholds={name: 0.0})
    session.step({0: (0, PROMPTS[0])})
    stand_in.counts.clear()
    assert int(session.step({0: (6, [4])})["early_exit_index"]) == 0
    # the exit's own MLP; those of layers 1 to 3 are skipped, an mlp exit runs in its layer's place
    assert stand_in.counts == {"mlp": 1, "skipped": 3}
    session = one.engine_session(thresholds={name: 1.0})
    stand_in.counts.clear()
    assert int(session.step({0: (0, [4])})["early_exit_index"]) == 1
    assert stand_in.counts == {"mlp": 4}


def test_a_step_with_a_prompt_in_it_runs_to_full_depth(exported, stand_in) -> None:
    """In-flight batching: a request joins while another decodes."""
    one, name = exported("llama"), ASKED[0]
    session = one.engine_session(thresholds={name: 0.0})
    evaluated = ExitPolicy(0.0, active=(name,)).evaluated_exits(one.model.exits)
    batch = PropagatingBatch(one.model, [evaluated] * 2, "max_probability", 16)
    steps = [
        ({0: (0, [5, 6])}, 1),
        ({0: (2, [7])}, 0),
        ({0: (3, [8]), 1: (0, [1, 2, 3])}, 1),
        ({0: (4, [9]), 1: (3, [4])}, 0),
    ]
    for feed, index in steps:
        outputs = session.step(feed)
        exits, logits = batch.run(feed, evaluating=index == 0)
        assert int(outputs["early_exit_index"]) == index and set(exits) == {[name, None][index]}
        assert (outputs["logits"] - logits).abs().max() <= TOLERANCE * logits.abs().max()


def test_an_engine_without_thresholds_is_the_stock_class(exported, stand_in) -> None:
    one = exported("qwen2")
    session = one.engine_session()
    assert all(name.startswith("exit_heads.") for name in session.model.not_required)
    logits = session.step({0: (0, PROMPTS[0])})["logits"]
    batch = PropagatingBatch(one.model, [()], "max_probability", 16)
    expected = batch.run({0: (0, PROMPTS[0])}, evaluating=False)[1]
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_padding_rows_of_the_vocabulary_are_no_tokens(stand_in) -> None:
    from nemo_ee.export.tensorrt_llm.files.tensorrt_llm_model import Exit, all_confident

    exit = Exit("a", 2, "norm", True, 0.63)
    logits = stand_in._wrap(torch.tensor([[2.0, 1.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]]))
    assert bool(all_confident(logits, exit, "max_probability", 3))
    assert not bool(all_confident(logits, exit, "max_probability", 4))


@pytest.mark.parametrize(
    ("early_exit", "message"),
    [
        ({"thresholds": {EXITS[-1]["name"]: 0.5}}, "an attention layer"),
        ({"thresholds": {"nowhere": 0.5}}, "names 'nowhere'"),
        ({"criterion": "margin"}, "criterion='margin'"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(early_exit: dict, message: str, exported, stand_in) -> None:
    with pytest.raises(ValueError, match=message):
        exported("llama").engine_session(**early_exit)


def test_builder_options_and_classes_that_do_not_fit_are_refused(exported, stand_in, monkeypatch) -> None:
    one = exported("llama")
    session = one.engine_session()
    monkeypatch.setattr(stand_in.plugins, "paged_kv_cache", None)  # what a release leaves to the builder
    session.step({0: (0, [1, 2])})
    monkeypatch.setattr(stand_in.plugins, "reduce_fusion", True)
    monkeypatch.setattr(stand_in.plugins, "paged_kv_cache", False)
    with pytest.raises(ValueError, match="needs --kv_cache_type paged; needs --reduce_fusion disable"):
        session.step({1: (0, [1, 2])})
    with pytest.raises(ValueError, match=r"--max_draft_len 4.*run to full depth; build it with the stock class"):
        session.model.prepare_inputs(max_batch_size=8, max_draft_len=4)
    one.engine_class = "EarlyExitQwen2ForCausalLM"
    try:
        with pytest.raises(ValueError, match="builds Qwen2ForCausalLM, config.json has LlamaForCausalLM"):
            one.engine_session()
    finally:
        one.engine_class = ENGINE_CLASSES["llama"]


# -- PyTorch backend -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_stand_in", "criterion"),
    [*(("1.2", one) for one in OF_LOGITS), ("1.4", "margin")],
    indirect=["torch_stand_in"],
)
@pytest.mark.parametrize("name", ENGINE_CLASSES)
def test_the_pytorch_file_gives_the_tokens_and_exits_of_the_runtime(
    name: str, criterion: str, exported, torch_stand_in
) -> None:
    one, used = exported(name), set()
    for quantile in (0.1, 0.4, 0.7, 0.9):
        thresholds, names = one.thresholds(criterion, quantile), in_order(one)
        session = one.torch_session(thresholds=thresholds, criterion=criterion)
        model = session.model

        def step(feed: Any, session=session, model=model, names=names) -> tuple[int, torch.Tensor]:
            before = model.steps_left_at.copy()
            logits = session.step(feed)
            left = [*(model.steps_left_at - before)]
            return (names.index(left[0]) if left and left != ["final"] else len(names)), logits

        policy = ExitPolicy(thresholds, criterion, active=tuple(ASKED))
        expected = generate_propagating(one.model, PROMPTS, max_new_tokens=NEW_TOKENS, policy=policy)
        tokens, exits = serve(step, names)
        assert [tuple(own) for own in tokens] == list(expected.tokens)
        assert [tuple(own) for own in exits] == list(expected.exits)
        used |= {exit for own in exits for exit in own}
    assert len(used) >= 2 and None in used, "control: some steps leave and some do not"


@pytest.mark.parametrize(
    ("backend", "work"), [("TRTLLM", {"attention": 3}), ("FLASHINFER", {"attention": 1, "append": 2})]
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_pytorch_skipped_layers_write_keys_and_values_alone(
    name: str, backend: str, work: dict, exported, torch_stand_in
) -> None:
    """No MLP and no output projection; no attention where the backend has a cache write of its own."""
    one, exit, logits = exported(name), ASKED[0], []
    for settings in ({}, {"attn_backend": backend}):
        session = one.torch_session(thresholds={exit: 0.0})
        if settings:
            session = one.torch_session(thresholds={exit: 0.0}, settings={**session.llm_args, **settings})
        session.step({0: (0, PROMPTS[0])})
        torch_stand_in.counts.clear()
        session.step({0: (6, [4])})
        assert session.model.steps_left_at == {exit: 1}
        counted = dict(torch_stand_in.counts)
        session.model.early_exit = session.model.early_exit._replace(exits=())  # full depth, over what was written
        logits.append(session.step({0: (7, [9])}))
    assert counted == {"mlp": 1, "o_proj": 1, **work}  # the exit's own MLP
    assert (logits[0] - logits[1]).abs().max() <= TOLERANCE * logits[0].abs().max()


def test_skipped_layers_with_an_nvfp4_cache_run_the_whole_attention(exported, torch_stand_in) -> None:
    """Only the stock attention passes on the scales of such a cache."""
    session = exported("llama").torch_session(thresholds={ASKED[0]: 0.0})
    session.step({0: (0, PROMPTS[0])})
    for layer in session.model.model.layers:
        layer.self_attn.quant_config.kv_cache_quant_algo = "NVFP4"
    torch_stand_in.counts.clear()
    session.step({0: (6, [4])})
    assert torch_stand_in.counts == {"mlp": 1, "attention": 3, "o_proj": 3}


def test_pytorch_steps_with_a_prompt_run_to_full_depth_and_steps_are_counted(exported, torch_stand_in) -> None:
    one, name = exported("llama"), ASKED[0]
    session = one.torch_session(thresholds={name: 0.0})
    session.step({0: (0, PROMPTS[0])})
    session.step({0: (6, [4])})
    torch_stand_in.counts.clear()
    session.step({0: (7, [4]), 1: (0, [1, 2])})
    assert torch_stand_in.counts["stock"] == 1 and session.model.steps_left_at == {name: 1}, "a prompt in the step"
    session.model.steps_left_at[name] = 998
    torch_stand_in.lines.clear()
    session.step({0: (8, [4])})
    session.step({0: (9, [4])})
    assert torch_stand_in.lines == [f"early exit, steps by exit: {{'{name}': 1000}}"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.pytorch_early_exit])
def test_the_directory_s_own_config_class_is_no_other_model(name: str, exported, torch_stand_in) -> None:
    """The backend trusts a directory's code; whoever switches that off gets the stock config class. Bitwise."""
    one, steps = exported(name), []
    for trust in (True, False):
        session = one.torch_session(thresholds=one.thresholds("margin", 0.3), criterion="margin",
                                    trust_remote_code=trust)  # fmt: skip
        steps.append([session.step({0: (0, PROMPTS[0])}), *(session.step({0: (6 + i, [7 * i])}) for i in range(8))])
        assert session.model.steps_left_at.total() == 8
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*steps, strict=True))


def test_a_log_line_says_that_the_class_is_in_use(exported, torch_stand_in) -> None:
    one, first, second = exported("llama"), ASKED[0], ASKED[3]
    one.torch_session(thresholds={second: 0.5, first: 0.25}, criterion="margin")
    one.torch_session()
    assert torch_stand_in.lines == [
        f"early exit: EarlyExitLlamaForCausalLM evaluates {first} > 0.25, {second} > 0.5 (margin)",
        "early exit: EarlyExitLlamaForCausalLM evaluates no exit, config.json has no thresholds",
    ]


def test_a_directory_without_thresholds_is_served_by_the_stock_class(exported, torch_stand_in) -> None:
    one = exported("mistral")
    session = one.torch_session()
    session.step({0: (0, PROMPTS[0])})
    logits = session.step({0: (6, [3])})
    assert torch_stand_in.counts["stock"] == 2
    batch = PropagatingBatch(one.model, [()], "max_probability", 16)
    batch.run({0: (0, PROMPTS[0])}, evaluating=False)
    expected = batch.run({0: (6, [3])}, evaluating=False)[1]
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_what_the_pytorch_backend_cannot_do_is_refused(exported, torch_stand_in) -> None:
    one = exported("llama")
    attends = EXITS[-1]["name"]
    with pytest.raises(ValueError, match=f"{attends}.*the cache has no place.*names 'nowhere'.*pipeline parallelism"):
        one.torch_session(thresholds={attends: 0.5, "nowhere": 0.5}, mapping={"pp_size": 2})
    session = one.torch_session(
        thresholds={ASKED[0]: 0.0}, settings={"cuda_graph_config": {}}  # the user's settings win on both APIs
    )  # fmt: skip
    session.step({0: (0, [1, 2])})
    with pytest.raises(RuntimeError, match="set cuda_graph_config to null"):
        session.step({0: (2, [1])})


def test_a_directory_with_thresholds_needs_no_settings_where_the_hook_exists(exported, torch_stand_in) -> None:
    """On 1.2 without serve.yaml the first decoding step ends with the setting to change."""
    one, base = exported("llama"), tensorrt_llm_executor_stand_in.LLM_ARGS
    session = one.torch_session(thresholds={ASKED[0]: 0.0}, settings={})
    session.step({0: (0, [1, 2])})
    if torch_stand_in.api == "1.2":
        assert session.llm_args == base
        with pytest.raises(RuntimeError, match="set cuda_graph_config to null"):
            session.step({0: (2, [1])})
    else:
        session.step({0: (2, [1])})
        assert session.llm_args == {
            **base,
            "cuda_graph_config": None,
            "disable_overlap_scheduler": True,
            "kv_cache_config": {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.9},
        }
    assert one.torch_session(settings={}).llm_args == base, "nothing changes for a directory without thresholds"


def test_both_files_import_without_tensorrt_llm() -> None:
    """As one file each, with nothing of nemo_ee: what is copied beside an export stands alone."""
    for name in ("tensorrt_llm_model", "tensorrt_llm_pytorch_model"):
        spec = importlib.util.spec_from_file_location("copied", model_file(name))
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert "nemo_ee" not in {line.split()[1].split(".")[0] for line in model_file(name).read_text().splitlines()
                                 if line.strip().startswith(("import ", "from "))}  # fmt: skip
    with pytest.raises(ImportError):
        importlib.import_module("nemo_ee.export.tensorrt_llm.files.tensorrt_llm_model").EarlyExitLlamaForCausalLM  # noqa: B018
