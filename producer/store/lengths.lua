--[[
lengths: how long a code must be after so many wrong checks. Comes before the scripts that ask.

Wrong checks of an address and purpose are counted across codes. The more there are, the longer a code must be, and the more
attempts it allows. Each further digit makes both ten times as many, so the attempts at a code succeed with the same chance at
every length.

attempts           wrong checks that a code of the shortest length allows
shortest, longest  digits
]]
local MORE_DIGITS = 2 -- from one length to the next; guessing.py has the same

-- Digits that a code needs after `count` wrong checks.
local function length_after(count, attempts, shortest, longest)
    local length, allowed, reached = shortest, attempts, attempts
    while count >= reached and length < longest do
        local digits = math.min(MORE_DIGITS, longest - length)
        length = length + digits
        allowed = allowed * 10 ^ digits
        reached = reached + allowed
    end
    return length
end

-- Whether `code` is no longer accepted. Before the first step every code is: those of an older server may be shorter.
local function too_short(code, count, attempts, shortest, longest)
    local length = length_after(count, attempts, shortest, longest)
    return length > shortest and #code < length
end
