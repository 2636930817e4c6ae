"""Record what openai-harmony makes of conversations made up at random, for tests/checkpoints/test_harmony.py.

    python -m tools.record_harmony

It needs the package openai-harmony 0.0.8, and its vocabulary: the file o200k_base.tiktoken in the folder that
TIKTOKEN_ENCODINGS_BASE names, or a network.
"""

import gzip
import json
import random
import sys
from pathlib import Path

from checkpoints.harmony import REASONING_EFFORTS
from command_line.run import run_main

OUT = Path(__file__).resolve().parent.parent / "tests" / "checkpoints" / "harmony_conversations.json.gz"
CONVERSATIONS, SCHEMAS = 200, 200
TEXTS = ["Hello ", "world", "\n", "  ", " x", "é世界", "<|end|>", "<|start|>assistant", "don't ", "123456", "\t", "🙂"]
TEXTS += ['{"a": 1}', " to=functions.x", "\r\n", "A", "b_c", "// ", '"', "\\"]
NAMES = ["get", "f_1", "Other", "naïve", "get-weather", "a.b"]


def text(draw: random.Random) -> str:
    return "".join(draw.choice(TEXTS) for _ in range(draw.randint(0, 8)))


def schema(draw: random.Random, depth: int = 0) -> dict:
    """Make up a JSON schema."""
    kinds = ["string", "number", "integer", "boolean", "enum", "any", "list"]
    kind = draw.choice(kinds + ["object", "array", "oneOf"] * (depth < 3))
    made = {
        "enum": {"type": "string", "enum": ["p", "q q"]},
        "any": {},
        "list": {"type": draw.sample(["string", "integer", "null", "number"], 2)},
    }.get(kind, {"type": kind})
    if kind == "object":
        names = draw.sample("abcdefgh", draw.randint(0, 4))
        made["properties"] = {name: schema(draw, depth + 1) for name in names}
        made["required"] = [name for name in names if draw.random() < 0.5]
    elif kind == "array" and draw.random() < 0.7:
        made["items"] = schema(draw, depth + 1)
    elif kind == "oneOf":
        made = {"oneOf": [schema(draw, depth + 1) for _ in range(draw.randint(1, 3))]}
    extras = {"description": text(draw), "title": "T t", "nullable": True, "examples": ["e1", "e2"]}
    extras["default"] = draw.choice(["p", 1, 2.5, True, None, ["a", 1], {"k": "v"}])
    return made | {name: value for name, value in extras.items() if draw.random() < 0.25}


def function(draw: random.Random, number: int) -> dict:
    properties = {name: schema(draw) for name in draw.sample("abcdefgh", draw.randint(0, 4))}
    required = [name for name in properties if draw.random() < 0.5]
    parameters = {"type": "object", "properties": properties, "required": required}
    name = f"{draw.choice(NAMES)}{number}"
    return {"name": name, "description": text(draw), "parameters": draw.choice([parameters, parameters, None])}


def conversation(draw: random.Random) -> dict:
    """Make up a setting and messages; reasoning stands only behind the last final answer."""
    setting = {"reasoning": draw.choice(REASONING_EFFORTS), "date": draw.choice([None, "2025-06-28"])}
    setting["instructions"] = draw.choice([None, text(draw) or "x"])
    functions = [function(draw, n) for n in range(draw.choice([0, 0, 1]))]
    messages = []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": text(draw)})
        if draw.random() < 0.5:
            name = f"functions.{draw.choice(NAMES)}"
            call = {"role": "assistant", "channel": "commentary", "recipient": name, "content": '{"a":"q"}'}
            messages.append(call | {"content_type": draw.choice([None, "json"])})
            result = {"role": "tool", "name": name, "channel": "commentary", "recipient": "assistant"}
            messages.append(result | {"content": text(draw)})
        if draw.random() < 0.7:
            messages.append({"role": "assistant", "channel": "final", "content": text(draw)})
    if draw.random() < 0.5:
        messages.append({"role": "assistant", "channel": "analysis", "content": text(draw)})
    return {"setting": setting, "functions": functions, "messages": messages}


def recorded(encoding, made: dict) -> str:
    """Return the text of openai-harmony's tokens for a conversation."""
    import openai_harmony as oh

    system = oh.SystemContent.new().with_reasoning_effort(oh.ReasoningEffort(made["setting"]["reasoning"].capitalize()))
    if made["setting"]["date"]:
        system = system.with_conversation_start_date(made["setting"]["date"])
    messages = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    if made["setting"]["instructions"] or made["functions"]:
        developer = oh.DeveloperContent.new()
        if made["setting"]["instructions"]:
            developer = developer.with_instructions(made["setting"]["instructions"])
        if made["functions"]:
            tools = [oh.ToolDescription.new(**fields) for fields in made["functions"]]
            developer = developer.with_function_tools(tools)
        messages.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    for fields in made["messages"]:
        author = oh.Author.new(oh.Role(fields["role"]), fields["name"]) if "name" in fields else oh.Role(fields["role"])
        make = oh.Message.from_author_and_content if "name" in fields else oh.Message.from_role_and_content
        message = make(author, fields["content"])
        if fields.get("channel"):
            message = message.with_channel(fields["channel"])
        if fields.get("recipient"):
            message = message.with_recipient(fields["recipient"])
        if fields.get("content_type"):
            message = message.with_content_type(f"<|constrain|>{fields['content_type']}")
        messages.append(message)
    whole = oh.RenderConversationConfig(auto_drop_analysis=False)
    tokens = encoding.render_conversation_for_completion(
        oh.Conversation.from_messages(messages), oh.Role.ASSISTANT, config=whole
    )
    return encoding.decode_utf8(tokens)


def main() -> None:
    import openai_harmony as oh

    encoding = oh.load_harmony_encoding(oh.HarmonyEncodingName.HARMONY_GPT_OSS)
    draw = random.Random(1)
    made = [conversation(draw) for _ in range(CONVERSATIONS)]
    setting = {"reasoning": "low", "date": None, "instructions": None}
    made += [
        {"setting": setting, "functions": [function(draw, 0), function(draw, 1)], "messages": []}
        for _ in range(SCHEMAS)
    ]
    found = [each | {"text": recorded(encoding, each)} for each in made]
    OUT.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))


if __name__ == "__main__":
    sys.exit(run_main(main))
