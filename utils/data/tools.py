"""The tools that a row declares, in the form that chat templates take: OpenAI's, with a JSON schema of arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..report.messages import show_messages

# Python's names of types, as xLAM writes them, and those of a JSON schema.
TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def list_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools of a row, which holds a list or its JSON text; each may be an object or JSON text, in OpenAI's form or
    bare ({"name", "description", "parameters"}).

    Raises ValueError where they are no list of objects.
    """
    if isinstance(tools, str):
        tools = _parse(tools)
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ValueError("no list")
    read = [_parse(tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in read):
        raise ValueError("not all are objects")
    return [_in_form(tool) for tool in read]


def show_prompt(prompt: Any, told: Mapping[str, str]) -> str:
    """A prompt as text, behind the tools that it may be answered with, where there are some."""
    tools = describe_tools(told.get("tools"))
    return f"Tools:\n{tools}\n\n{show_messages(prompt)}" if tools else show_messages(prompt)


def describe_tools(tools: Any) -> str:
    """The tools of a row for people and judges, one a line: name, arguments with their types, what it is for.

    Text that holds no tools, as damaged files may have it, stays as it is.
    """
    try:
        return "\n".join(map(_describe, list_tools(tools)))
    except ValueError:
        return str(tools)


def _describe(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return json.dumps(tool, ensure_ascii=False)
    schema = function.get("parameters")
    schema = schema if isinstance(schema, Mapping) else {}
    fields, needed = schema.get("properties"), schema.get("required")
    arguments = (
        f"{name}{'' if isinstance(needed, list) and name in needed else '?'}{_shown_type(field)}"
        for name, field in (fields.items() if isinstance(fields, Mapping) else ())
    )
    about = f": {function['description']}" if function.get("description") else ""
    return f"{function.get('name')}({', '.join(arguments)}){about}"


def _shown_type(field: Any) -> str:
    kind = field.get("type") if isinstance(field, Mapping) else None
    return f": {kind}" if isinstance(kind, str) else ""


def _parse(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _in_form(tool: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping) or not isinstance(tool.get("name"), str):
        return dict(tool)
    function = {key: value for key, value in tool.items() if key != "type"}
    if "parameters" in function:
        function["parameters"] = _as_schema(function["parameters"])
    return {"type": "function", "function": function}


def _as_schema(parameters: Any) -> Any:
    """xLAM's parameters, {name: {"description", "type", "default"}}, as a JSON schema; a schema as it is."""
    if not isinstance(parameters, Mapping) or not all(isinstance(field, Mapping) for field in parameters.values()):
        return parameters
    required = [
        name
        for name, field in parameters.items()
        if "default" not in field and "optional" not in str(field.get("type", "")).lower()
    ]
    properties = {name: {**field, **_type_of(field)} for name, field in parameters.items()}
    return {"type": "object", "properties": properties, "required": required}


def _type_of(field: Mapping[str, Any]) -> dict[str, str]:
    kind = field.get("type")
    if not isinstance(kind, str):
        return {}
    word = kind.partition(",")[0].strip()
    return {"type": TYPES.get(word.partition("[")[0].strip().lower(), word)}
