"""The queue as the worker sees it: commands, messages, dead letters, and their Lua."""
