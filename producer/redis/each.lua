--[[
each: the first part of every script that serves many requests in one call. Each request is served as if it came alone: an
error that Redis raises for one of them (memory, access, a key of another type) concerns that one only, and what was written
for it before stays. Redis refuses memory only to a script that has written nothing yet.

KEYS, ARGV                those of the script that follows
Returns by each(count, step): {step(1) ... step(count)}, with an error in place of each step that raised one; or one error
for all of them if the server cannot write or answer at all.
]]
local function each(count, step)
    local answer = {}
    for i = 1, count do
        local fine, entry = pcall(step, i)
        if not fine then
            -- Redis 7 raises a table; 6.2 a string that begins with the script's name and line.
            local said = type(entry) == 'table' and entry.err or tostring(entry)
            said = string.match(said, '^@?user_script: ?%d+: %-?(.*)$') or said
            local kind = string.match(said, '^(%u+) ')
            entry = { err = kind and said or 'ERR ' .. said }
            if kind == 'READONLY' or kind == 'MASTERDOWN' then
                return entry
            end
        end
        answer[i] = entry
    end
    return answer
end
