--[[
unacked: how an entry of `unacked` is read. Comes before the scripts that read one.
]]

-- The message in an entry, and its queue. kombu writes [message, exchange, routing key].
local function message_of(entry)
    return string.match(entry, '^%[(.*),%s*"[^"]*",%s*"([^"]*)"%]$')
end
