"""argv and --config FILE to Settings."""

from .cross_checks import check_adapter_flags
from .parsing import command_line, parse_arguments, words_of

__all__ = ["check_adapter_flags", "command_line", "parse_arguments", "words_of"]
