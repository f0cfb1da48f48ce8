"""The queue: commands and their Lua, messages, dead letters."""
