--[[
record: what the forms of a request record have in common, whichever release wrote it. Comes before the scripts that ask.

In every form `who` begins with the form's version and a colon, and `first` is the time (ms) at which the request was first
seen. All else may differ, so a record of another version is neither changed nor understood.
]]

-- Whether two values of `who` belong to records of one version.
local function same_version(one, other)
    return string.match(one, '^%d+:') == string.match(other, '^%d+:')
end
