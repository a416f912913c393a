"""argv and --config FILE to Settings."""

from utils.arguments.parsing import command_line, parse_arguments

__all__ = ["command_line", "parse_arguments"]
