"""The operators' tools: the command `vectorkeep`, one file a verb. It parses and prints; the library works."""
