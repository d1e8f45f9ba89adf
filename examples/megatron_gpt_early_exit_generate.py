# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Generate text with an early-exit model and show each token's exit. See conf/megatron_gpt_early_exit_generate.yaml.

python examples/megatron_gpt_early_exit_generate.py model.restore_from_path=tuned.nemo prompts='["def add(a, b):"]' \
    threshold=0.8 trainer.accelerator=cpu
"""

import json
import os
import shutil

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command, refuse_renamed_overrides
from nemo_ee.commands.console import results, show


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_generate")
def main(cfg: DictConfig) -> None:
    """Check, load, generate, print."""
    with command(cfg):
        from nemo_ee.commands.certified_generation import with_certificate
        from nemo_ee.commands.generation_request import GenerationRequest

        request = with_certificate(GenerationRequest.from_config(cfg))
        # NeMo is imported here because Megatron's checkpoint writer starts a process that imports this file again.
        from nemo.utils.get_rank import is_global_rank_zero

        from nemo_ee.commands.generate import open_generator

        generator = open_generator(cfg, request)
        if generator is None:  # a later pipeline stage, whose work is done
            return
        with generator:
            generator.check(request.prompts)  # once more with the loaded tokenizer, all before the first answer
            if is_global_rank_zero():
                show_answers(generator, request)
            else:
                for _ in generator.generate(request.prompts):
                    pass
        if generator.num_failed:
            raise RuntimeError(f"{generator.num_failed} of {len(request.prompts)} answers failed; see their messages")


def show_answers(generator, request) -> None:
    """Print every answer, then the table of exits used; write `output`."""
    from nemo_ee.text.token_view import ExitLegend, coloured_text, escape, exit_table, marked_text

    results().reconfigure(errors="backslashreplace")  # a character missing in the terminal is no error
    wanted = results().isatty() and "NO_COLOR" not in os.environ
    colour = wanted if request.colour == "auto" else request.colour == "always"
    legend = ExitLegend(generator.model.exits)
    with open(request.output or os.devnull, "w", encoding="utf-8") as output:
        answers = stream(generator, request, legend) if colour else generator.generate(request.prompts)
        for label, answer in zip(request.labels, answers, strict=True):
            if not colour:
                width = shutil.get_terminal_size().columns - 1
                show(marked_text(answer.prompt, answer.tokens, legend, width=width), log=False)
            elif request.batch_size > 1:
                show(coloured_text(answer.prompt, answer.tokens, legend), end="", log=False)
            if answer.error is not None:
                show(f"\nfailed: {escape(answer.error)}", end="")
            show("\n" if colour else "")
            output.write(json.dumps({**label, **answer.to_mapping()}, ensure_ascii=False) + "\n")
            output.flush()
    table = exit_table(
        generator.stats, generator.model.exits, seconds=generator.seconds, legend=legend if colour else None
    )
    show(table)


def stream(generator, request, legend):
    """Answers, printed token by token where prompts are decoded one at a time."""
    from nemo_ee.text.token_view import coloured_text

    if request.batch_size > 1:
        yield from generator.generate(request.prompts)
        return
    for prompt in request.prompts:
        show(coloured_text(prompt, [], legend), end="", log=False)
        yield from generator.generate(
            [prompt], on_token=lambda token: show(legend.paint(token.text, token.exit), end="", log=False)
        )


if __name__ == "__main__":
    refuse_renamed_overrides()
    main()
