--[[
lengths: before the scripts that ask how long a code must be. Wrong checks of an address and purpose are counted across
codes; the more there are, the longer is a code that can still be accepted, and the more attempts it allows: each digit
more makes both ten times as many, so that all of them together find a code with the same chance at each length.

attempts, shortest, longest: wrong checks of a code of the shortest length; digits
]]
local MORE_DIGITS = 2 -- from one length to the next

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

-- Whether `code` may not be accepted any more. Before the first step any code may: an older server's can be shorter.
local function too_short(code, count, attempts, shortest, longest)
    local length = length_after(count, attempts, shortest, longest)
    return length > shortest and #code < length
end
