"""SPEC 9.5: tools that the client runs and whose schema is OpenAI's own, in requests, answers and history."""

import json

import pytest
from conftest import IN_ORDER, both_ways
from fake_provider import chunk, completion, sse
from strict_models import assert_event, assert_response
from turns import parsed

from dialects.client_tools import call_fields

TOOLS = {
    "shell": {"type": "shell"},
    "shell of this machine": {"type": "shell", "environment": {"type": "local"}},
    "local_shell": {"type": "local_shell"},
    "apply_patch": {"type": "apply_patch"},
}
HOSTED = [
    {"type": "web_search"}, {"type": "file_search", "vector_store_ids": ["v"]}, {"type": "image_generation"},
    {"type": "code_interpreter", "container": {"type": "auto"}}, {"type": "mcp", "server_label": "x"},
    {"type": "shell", "environment": {"type": "container_auto"}},
]  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_tool_that_the_client_runs_is_offered_as_a_function(tool):
    (offered,) = parsed(tools=[*HOSTED, tool]).body["tools"]

    assert (offered["type"], offered["function"]["name"]) == ("function", tool["type"])
    assert offered["function"]["parameters"]["required"]
    assert parsed(tools=[tool], tool_choice={"type": tool["type"]}).body["tool_choice"] == {
        "type": "function",
        "function": {"name": tool["type"]},
    }


def test_what_only_openais_servers_run_is_left_out():
    assert "tools" not in parsed(tools=HOSTED, tool_choice="auto").body


PATCH = {"type": "update_file", "path": "a.py", "diff": "@@\n-a\n+b"}
EXEC = {"type": "exec", "env": {}, "user": None, "timeout_ms": None, "working_directory": None}
# Of each: the arguments that a model wrote, and what the item says.
CALLS = {
    "commands": ("shell", {"commands": ["ls", "pwd"], "timeout_ms": 5}, {
        "action": {"commands": ["ls", "pwd"], "timeout_ms": 5, "max_output_length": None}
    }),
    "one command as text": ("shell", {"commands": "ls"}, {
        "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None}
    }),
    "a program": ("local_shell", {"command": ["bash", "-lc", "ls"], "working_directory": "/w"}, {
        "action": EXEC | {"command": ["bash", "-lc", "ls"], "working_directory": "/w"}
    }),
    "a patch": ("apply_patch", PATCH, {"operation": PATCH}),
    "a patch one level down": ("apply_patch", {"operation": PATCH}, {"operation": PATCH}),
    "a file to delete": ("apply_patch", {"type": "delete_file", "path": "a.py"}, {
        "operation": {"type": "delete_file", "path": "a.py"}
    }),
}  # fmt: skip


@both_ways
@pytest.mark.parametrize(("kind", "arguments", "told"), CALLS.values(), ids=CALLS)
async def test_a_call_of_it_is_told_as_the_item_that_the_client_waits_for(
    start_gateway, fake, kind, arguments, told, streaming
):
    gateway = await start_gateway(["a"])
    text = json.dumps(arguments)
    function = {"name": kind, "arguments": text}
    if streaming:
        cut = len(text) // 2
        pieces = [{"index": 0, "id": "c1", "type": "function", "function": function | {"arguments": text[:cut]}}]
        pieces.append({"index": 0, "function": {"arguments": text[cut:]}})
        fake.script("a", sse(*(chunk(tool_calls=[piece]) for piece in pieces), chunk(finish="tool_calls")))
    else:
        call = {"id": "c1", "type": "function", "function": function}
        fake.script("a", completion(None, finish="tool_calls", message={"tool_calls": [call]}))

    request = {"model": IN_ORDER, "input": "hi", "tools": [{"type": kind}], "stream": streaming}
    got = await gateway.send(request, path="/v1/responses")

    if streaming:
        blocks = got.body.decode().strip().split("\n\n")
        events = [json.loads(block.split("data: ", 1)[1]) for block in blocks]
        for event in events:
            assert_event(event)
        response = events[-1]["response"]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
        assert done == response["output"]
        assert [item["status"] for item in added] == ["in_progress"]
    else:
        response = got.json
    assert_response(response)
    (item,) = response["output"]
    assert {name: item[name] for name in told} == told
    assert (item["type"], item["call_id"], item["status"]) == (f"{kind}_call", "c1", "completed")


def test_arguments_that_cannot_be_read_are_the_call_itself():
    assert call_fields("shell", "ls -la")["action"]["commands"] == ["ls -la"]
    assert call_fields("local_shell", "[1]")["action"]["command"] == ["[1]"]
    assert call_fields("apply_patch", "@@ what")["operation"] == {"type": "update_file", "path": "", "diff": "@@ what"}


SHOWN = [{"stdout": "a\n", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]
HISTORY = {
    "shell": (
        {
            "type": "shell_call",
            "call_id": "c1",
            "action": {"commands": ["ls"], "timeout_ms": None},
            "status": "completed",
        },
        {"type": "shell_call_output", "call_id": "c1", "output": SHOWN},
        {"commands": ["ls"]},
        json.dumps(SHOWN, separators=(",", ":")),
    ),
    "local_shell": (
        {"type": "local_shell_call", "id": "c1", "action": {"type": "exec", "command": ["ls"], "env": {}}},
        {"type": "local_shell_call_output", "id": "c1", "output": "a"},
        {"command": ["ls"]},
        "a",
    ),
    "apply_patch": (
        {"type": "apply_patch_call", "call_id": "c1", "operation": PATCH, "status": "completed"},
        {"type": "apply_patch_call_output", "call_id": "c1", "status": "failed", "output": "no such line"},
        PATCH,
        "no such line",
    ),
    "apply_patch without words": (
        {"type": "apply_patch_call", "call_id": "c1", "operation": PATCH, "status": "completed"},
        {"type": "apply_patch_call_output", "call_id": "c1", "status": "completed"},
        PATCH,
        "completed",
    ),
}


@pytest.mark.parametrize(("called", "output", "arguments", "told"), HISTORY.values(), ids=HISTORY)
def test_its_calls_and_outputs_are_seen_again_by_the_model(called, output, arguments, told):
    _, asked, answered = parsed(input=[{"role": "user", "content": "hi"}, called, output]).body["messages"]

    (call,) = asked["tool_calls"]
    assert (call["id"], call["function"]["name"]) == ("c1", called["type"].removesuffix("_call"))
    assert json.loads(call["function"]["arguments"]) == arguments
    assert answered == {"role": "tool", "tool_call_id": "c1", "content": told}
