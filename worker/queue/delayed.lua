--[[
delayed: how an entry of the delayed requests is written and read. Comes before the scripts that do.

Workers of two releases share these entries. One whose version is not known stays as it is, for a worker that knows it. Raise
the version when the form changes, and read the one before for one release: docs/upgrading.md.
]]

-- `since`: the request's birth or due time, ms.
local function delayed_entry(since, message)
    return string.format('1:%.0f ', since) .. message
end

-- The time and the message of an entry; nil if its version is not known.
local function read_delayed(entry)
    return string.match(entry, '^1:(%d+) (.*)$')
end
