"""The code store, the backlog and their Lua."""
