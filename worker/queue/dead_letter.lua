--[[
dead_letter: move a reserved message to the dead letters.

KEYS 1 unacked     hash
     2 index       zset
     3 dead        list   JSON: code, reason, at (Unix seconds), message (as it came); if that was too large, only its beginning,
                          with size (bytes of the whole) and id (the request's, if it was found)
ARGV 1 tag
     2 code        string why, for programs
     3 reason      string why, for people
     4 too large   string the code of a message that was too large

Returns 1, or 0 if this worker does not hold the message any more.
]]
local entry = redis.call('HGET', KEYS[1], ARGV[1])
if not entry then
    return 0
end
local time = redis.call('TIME')
local message = message_of(entry)
local letter = { code = ARGV[2], reason = ARGV[3], at = time[1] + time[2] / 1000000, message = message }
-- What merely looks like the rest of a message that was too large may be nested too deeply for cjson, or have any id.
local fine, left = pcall(cjson.decode, ARGV[2] == ARGV[4] and message or '')
if fine then
    letter.message, letter.size = left.cut.message, left.cut.size
    local id = type(left.headers) == 'table' and left.headers.id
    letter.id = type(id) == 'string' and id or nil
end
redis.call('LPUSH', KEYS[3], cjson.encode(letter))
local removed = redis.pcall('HDEL', KEYS[1], ARGV[1])
if type(removed) == 'table' and removed.err then
    redis.pcall('LPOP', KEYS[3])
    return redis.error_reply(removed.err)
end
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
