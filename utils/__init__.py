"""Fine-tuning of language models on preference pairs. Each folder is a room; imports between rooms run one way.

Which verbs there are, and the file in which each one begins, is said in settings/registry.py.
"""

__version__ = "0.9.0"
