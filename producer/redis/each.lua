--[[
each: the beginning of every script that serves many requests in one call. They are served one after the other, as if each
came alone: what Redis refuses one of them (memory, access, a key of another type) hits that one only, and what was written
for it before stays. Memory is refused to a script only until it has written something.

KEYS                      what follows says
ARGV                      likewise
Returns by each(count, step): {step(1) ... step(count)}, with an error in the place of each step that raised one; or one
error for all of them where the server as a whole cannot write or answer.
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
