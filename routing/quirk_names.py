"""Every quirk that a platform or model may have in the catalogue, with its JSON type.

adapters/quirks.py carries them out; config/catalog_files.py checks them.
"""

from __future__ import annotations

from collections.abc import Mapping

QUIRKS: Mapping[str, type] = {
    # The body
    "drop": list,  # fields to leave out
    "standard_fields_only": bool,  # refuses fields that are not in OpenAI's chat API, in messages and tools too
    "rename": dict,
    "max": dict,  # clamp to
    "min": dict,
    "default": dict,
    "stop_max": int,
    "stop_as_array": bool,
    "reasoning_efforts": list,  # those it knows, lowest first
    "effort_as_thinking": bool,  # a switch {"thinking": {"type": …}} in place of an effort
    "effort_as_template": str,  # a switch of this name for the model's chat template; efforts beside it, but not "none"
    "json_object_as_schema": bool,  # JSON mode only with a schema
    "single_tool_call": bool,
    "strip_tool_schema_keys": list,
    "no_suffix": bool,  # its endpoint for prompts knows only what comes before
    "no_stream": bool,
    "no_stream_usage": bool,
    # The messages
    "drop_message_fields": list,
    "message_fields": list,  # all it takes
    "flatten_content": bool,  # content must be text
    "null_content_rejected": bool,
    "tool_call_id_pattern": str,
    "replay_reasoning_content": bool,  # wants its thoughts back
    "replay_fields": list,  # of messages and calls that it gave out and wants back: reasoning_details, extra_content
    "system_first": bool,  # one system message, at the head
    "strict_turns": bool,  # an assistant turn between result and user
    # Embeddings
    "embeddings_path": str,  # in place of /embeddings, after the base URL; in OpenAI's form, with the key as bearer
    "batch_max": int,  # texts in one request
    # Gemini's wire
    "system_as_user": bool,
    "schema_subset": bool,  # takes no JSON Schema for parameters and answers, only its own subset
    "thinking": str,  # how effort is told: "level" or "budget"
    "call_signatures": bool,  # wants a thought signature on the first call of a step
    # Answers and errors
    "error_codes": dict,  # its own codes, in adapters/errors.py's STATUS_BY_NAME's words
    "error_texts": dict,  # likewise, where it has words only
    "credit_resets_daily": bool,
    "daily_headers": list,  # counters of the day; at "0" its quota is used up
    # Embeddings
    "unit_vectors": bool,  # are to be brought to length 1
    # Keys and addresses
    "headers": dict,
    "env_account": list,
    "anonymous_key": str,  # what stands for a key where there is none
}
