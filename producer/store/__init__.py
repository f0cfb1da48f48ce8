"""The code store and the backlog: commands with their Lua, and how their answers are read."""
