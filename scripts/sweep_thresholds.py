# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity and depth of an early-exit model over confidence thresholds. See conf/sweep_thresholds.yaml.

python scripts/sweep_thresholds.py model.restore_from_path=tuned.nemo data=data/heldout trainer.accelerator=cpu

The text is cut into windows; in each, every token but the first is scored (`EarlyExitEngine.score`).

    perplexity = exp(- sum of ln p / tokens),  depth = mean number of layers below the exits the tokens left at,
    evaluated = exits evaluated per token, the final one left out: the price of the decisions
"""

import math
from collections import Counter
from typing import Annotated, Any, ClassVar

import hydra
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from nemo_ee.commands.command import command, refuse_renamed_overrides
from nemo_ee.commands.console import messages, show
from nemo_ee.settings.fields import Criterion, ExitNames, ModelFile, NonNegative, Run
from nemo_ee.settings.library_keys import trainer_keys
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Natural, Positive, Text, UserInput, rule


class Model(UserInput):
    """The `model` block."""

    restore_from_path: ModelFile
    backbone_path: Text | None
    tensor_model_parallel_size: Positive


class SweepSettings(ScriptInput):
    """The settings of conf/sweep_thresholds.yaml, a field for each key."""

    headline: ClassVar = "nothing was scored"
    libraries: ClassVar = {"trainer": trainer_keys}

    data: Text
    output: Text | None
    thresholds: Annotated[tuple[NonNegative, ...], Field(min_length=1)]
    criterion: Criterion
    exits: ExitNames
    max_pending_tokens: Natural | None
    length: Annotated[int, Field(ge=2), rule("a whole number of tokens from 2")]
    max_tokens: Positive | None
    batch_size: Positive
    trainer: Run
    model: Model


def sweep(cfg: DictConfig) -> dict[str, Any]:
    """Score the text at full depth and at every threshold. Every rank must call it.

    Returns:
        {"tokens", "num_layers", "full": perplexity, "rows": [{"threshold", "perplexity", "ratio", "depth",
        "evaluated", "tokens_per_exit", "evaluated_per_exit"}]}

    Raises:
        ValueError: every problem of the settings, before weights are loaded.
    """
    from nemo_ee.commands.generate import open_generator
    from nemo_ee.data.token_windows import TokenWindows
    from nemo_ee.evaluation.scoring_request import model_settings, scoring_request
    from nemo_ee.generation.engine import EarlyExitEngine
    from nemo_ee.models.connector import read_config

    SweepSettings.from_config(cfg)
    config = OmegaConf.to_container(cfg, resolve=True)
    own = config.pop("model")
    config["model"] = model_settings(own["restore_from_path"], own["backbone_path"], own["tensor_model_parallel_size"])
    config |= {"mode": "early_exit", "add_BOS": False, "output": None}
    for key in ("data", "length", "max_tokens", "thresholds"):
        del config[key]
    requests = {one: scoring_request({**config, "threshold": one}) for one in cfg.thresholds}
    vocabulary = read_config(own["restore_from_path"]).get("vocab_size")
    windows = TokenWindows(str(cfg.data), seq_length=cfg.length - 1, max_tokens=cfg.max_tokens, vocab_size=vocabulary)
    generator = open_generator(OmegaConf.create(config), next(iter(requests.values())))
    engine = EarlyExitEngine(generator.model)
    texts = []
    for tokens, labels, mask in (windows[index] for index in range(len(windows))):
        count = int(mask.sum())
        texts.append([*tokens[:count].tolist(), int(labels[count - 1])])
    full = _score(engine, texts, cfg.batch_size, "full", None)
    rows = []
    for threshold, request in requests.items():
        row = _score(engine, texts, cfg.batch_size, "early_exit", request.policy)
        rows.append({"threshold": threshold, **row, "ratio": row["perplexity"] / full["perplexity"]})
    return {
        "tokens": sum(len(text) - 1 for text in texts),
        "num_layers": generator.model.num_layers,
        "full": full["perplexity"],
        "rows": rows,
    }


def _score(engine: Any, texts: list[list[int]], batch_size: int, mode: str, policy: Any) -> dict[str, Any]:
    """Perplexity, depth and exits of all texts, the first token of each as context."""
    from tqdm import tqdm

    from nemo_ee.generation.stats import FINAL

    total, depth, tokens, counts, evaluated = 0.0, 0.0, 0, Counter(), Counter()
    name = "full model" if policy is None else f"threshold {policy.thresholds}"
    for first in tqdm(range(0, len(texts), batch_size), desc=name, dynamic_ncols=True, file=messages()):
        scored = engine.score(texts[first : first + batch_size], 1, mode=mode, policy=policy)
        total += sum(map(math.fsum, scored.logprobs))
        tokens += scored.stats.num_tokens
        depth += scored.stats.mean_depth * scored.stats.num_tokens
        # `update` keeps the exits that no token left at; `+` would drop them.
        counts.update(scored.stats.tokens_per_exit)
        evaluated.update(scored.stats.evaluations)
    return {
        "perplexity": math.exp(-total / tokens),
        "depth": depth / tokens,
        "evaluated": (evaluated.total() - evaluated[FINAL]) / tokens,
        "tokens_per_exit": dict(counts),
        "evaluated_per_exit": dict(evaluated),
    }


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    # Exits at which tokens could not leave have no column.
    rows = report["rows"]
    names = [name for name in rows[0]["evaluated_per_exit"] if any(row["evaluated_per_exit"][name] for row in rows)]
    depth = f"depth of {report['num_layers']}"
    lines = [
        f"| threshold | perplexity | x full | {depth} | exits evaluated | {' | '.join(names)} |",
        "|---" * (5 + len(names)) + "|",
    ]
    for row in rows:
        shares = [f"{row['tokens_per_exit'][name] / report['tokens']:.0%}" for name in names]
        numbers = [
            f"{row['perplexity']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['depth']:.2f}",
            f"{row['evaluated']:.2f}",
        ]
        lines.append(f"| {' | '.join([str(row['threshold']), *numbers, *shares])} |")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path="../conf", config_name="sweep_thresholds")
def main(cfg: DictConfig) -> None:
    """Score, print the table, write `output`."""
    with command(cfg):
        report = sweep(cfg)
        from nemo.utils.get_rank import is_global_rank_zero

        from nemo_ee.checkpoint.atomic import write_json

        if is_global_rank_zero():
            if cfg.output is not None:
                write_json(cfg.output, report)
            show(f"full model: perplexity {report['full']:.3f} on {report['tokens']:,} tokens\n\n{table(report)}")


if __name__ == "__main__":
    refuse_renamed_overrides()
    main()
