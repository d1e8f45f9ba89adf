# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The settings of the scripts that need no NeMo: exports, the server, data, pictures, pre-training of a small model.

`anything` stands where the setting's own reader has more to say than its kind.
"""

from __future__ import annotations

from nemo_ee.exits.block_reader import boolean, integer, number, one_of
from nemo_ee.settings.checks import (
    anything,
    below,
    criterion,
    either,
    exit_names,
    label,
    list_of,
    one_or_list_of,
    or_null,
    share,
    text,
)
from nemo_ee.settings.known import KnownSettings

_names = one_or_list_of(text, what="a name or a list of names")
_files = one_or_list_of(text, what="the name of a file or a list of names")
_texts = list_of(text, what="a list of texts")
_EXPORT = {
    "checkpoint": text,
    "output": text,
    "backbone": or_null(text),
    "exits": or_null(_names),
    "dtype": or_null(one_of(("bfloat16", "float16", "float32"))),
    "thresholds": anything,
    "criterion": criterion,
    "parity_gigabytes": anything,
    "progress": boolean,
}

EXPORT_HUGGINGFACE = KnownSettings({**_EXPORT, "targets": _names, "shard_gigabytes": anything})

EXPORT_TENSORRT_LLM = KnownSettings(
    {
        **_EXPORT,
        "tensor_parallel": integer(1),
        "pipeline_parallel": integer(1),
        "draft_tensor_parallel": or_null(integer(1)),
        "drafts": or_null(_names),
        "max_position_embeddings": or_null(integer(1)),
    }
)

SERVE = KnownSettings(
    {
        "model": text,
        "name": or_null(label),
        "chat_template": or_null(text),
        "device": text,
        "dtype": or_null(one_of(("float32", "bfloat16", "float16"))),
        "host": text,
        "api_keys_file": or_null(text),
        "exits": exit_names,
        **dict.fromkeys(
            (
                "num_threads port mode criterion threshold max_pending_tokens num_draft_tokens cost_rule num_slots "
                "max_length max_queue max_new_tokens max_choices max_body_bytes max_connections request_timeout "
                "shutdown_timeout"
            ).split(),
            anything,
        ),
    }
)

_PREPROCESS = {
    "input": _files,
    "output": text,
    "tokenizer": text,
    "jsonl_extensions": _texts,
    "append_eod": anything,
    "dtype": anything,
    "max_document_bytes": anything,
    "overwrite": anything,
}

PREPROCESS_TEXT = KnownSettings(
    {**_PREPROCESS, "text_extensions": _texts, "text_key": text, "max_documents": anything}
)

PREPROCESS_CHAT = KnownSettings(
    {**_PREPROCESS, "messages_key": text, "chat_template": or_null(text), "pad_to": anything}
)

COLLECT_SOURCES = KnownSettings(
    {
        "output": text,
        "library": boolean,
        **dict.fromkeys("licences library_excluded vendored excluded held_out".split(), _texts),
        **dict.fromkeys("max_distribution_bytes min_file_bytes max_file_bytes max_line_bytes".split(), anything),
        "overwrite": boolean,
    }
)

_caption = either(text, one_of(("",)), rule="must be a text")
PLOT_TUNING = KnownSettings(
    {
        "run": text,
        "output": text,
        "metric": text,
        "validation": boolean,
        **dict.fromkeys("panels colours styles quantity".split(), or_null(text)),
        "title": _caption,
        "caption": _caption,
    }
)

PRETRAIN = KnownSettings(
    {
        "data": _files,
        "output": text,
        "held_out": or_null(_files),
        "start_from": or_null(text),
        **dict.fromkeys(
            (
                "model.num_hidden_layers model.hidden_size model.intermediate_size model.num_attention_heads "
                "model.max_position_embeddings model.vocab_size sequence_length batch_size steps save_every "
                "validate_every validation_windows final_validation_windows max_steps_this_run "
                "exit_loss_weight precision max_document_bytes"
            ).split(),
            anything,
        ),
        "model.tie_word_embeddings": boolean,
        "exit_layers": one_or_list_of(integer(1), what="a layer from 1, or a list of layers"),
        "warmup_steps": integer(0),
        "decay_steps": integer(1),
        "lr": number(above=True),
        "weight_decay": number(),
        "betas": list_of(below(1.0, share), length=2, what="a list of two numbers of at least 0 and below 1"),
        "clip": number(above=True),
        "seed": integer(0),
    }
)
