"""The operators' tools: the `vectorkeep` command, one file a verb."""
