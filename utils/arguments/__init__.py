"""argv and --config FILE to Settings."""

from utils.arguments.cross_checks import check_adapter_flags
from utils.arguments.parsing import command_line, parse_arguments

__all__ = ["check_adapter_flags", "command_line", "parse_arguments"]
