--[[
settle: records how sends ended; one atomic step for each, in their order; begins with each.lua, buckets.lua and
record.lua. Compares the lease's token first: a holder that lost its lease changes nothing.

KEYS 4i-3 request record  hash    see issue.lua
     4i-2 code            string
     4i-1 bucket          string  the address' bucket, see buckets.lua
     4i   suppressed      string  reason, end (ms) and period (ms) with a space between
ARGV 1  cooldown          ms      0: off
     2  remember          ms      life of the record
     3  record prefix     string  + request id: the records of joined requests
     4  cooldown prefix   string  + code key: string
     5  sending prefix    string  + code key: string
     6  joined prefix     string  + code key: set
     7  success           int     error code: a relay accepted the mail
     8  invalid address   int     error code that is final for the mailbox
     9  mail rejected     int     likewise
     10 first period      ms      that an address is suppressed after its mailbox was refused
     11 longest period    ms      each further refusal after the end doubles the period up to this one
     then three for each:
     token                string
     result               string  'failed' (no relay accepted it, try again) | 'unknown' (one may have; try again)
                                  | the error code that answers the request
     refusal              string  'refused': suppress the address; 'respelled': do not, but keep the charge; else ''

Returns a list with an entry for each: {1 if this holder had the lease else 0, id to wake ...}, or an error of this one
alone. If the mail was accepted and its code is still live, or if the mailbox is refused for good, every joined request
gets the same answer in its record; otherwise one of them may send. A joined request whose record has another version is only
woken.

The suppressed key outlives its end by its period, and by at least the life of a record, so that a mailbox which is refused again
is known. It lives no longer, or strangers could fill the server with mailboxes that do not exist. An accepted mail deletes it if
its reason is 'refused'. A suppression with another reason is neither deleted nor replaced before its end.
]]
local cooldown, remember = tonumber(ARGV[1]), ARGV[2]
local id_at = #ARGV[3] + 1
local SUCCESS, INVALID_ADDRESS, MAIL_REJECTED = ARGV[7], ARGV[8], ARGV[9]
local first_period, longest_period = tonumber(ARGV[10]), tonumber(ARGV[11])

-- `found`: what the key holds.
local function suppress(key, reason, found)
    local time = call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local period = first_period
    if found then
        local known, ends, last = string.match(found, '^(%S+) (%d+) (%d+)$')
        if known and tonumber(ends) > now then
            return -- this send was under way when the suppression began: such sends count once
        end
        if known == reason then
            period = math.min(2 * last, longest_period)
        end
    end
    local value = string.format('%s %.0f %.0f', reason, now + period, period)
    call('SET', key, value, 'PX', string.format('%.0f', period + math.max(period, tonumber(remember))))
end

return each(#KEYS / 4, function(i)
    local record_key, code_key, address_key = KEYS[4 * i - 3], KEYS[4 * i - 2], KEYS[4 * i - 1]
    local suppressed_key = KEYS[4 * i]
    local token, result, refusal = ARGV[3 * i + 9], ARGV[3 * i + 10], ARGV[3 * i + 11]

    local record = call('HMGET', record_key, 'token', 'error', 'who', 'charged', 'mark', 'doubts', 'dot', 'tries')
    if record[1] ~= token or record[2] then
        return { 0 }
    end
    -- First, because it needs no memory: a full server refuses only a script's first write, and the outcome must be
    -- recorded even there.
    call('PEXPIRE', record_key, remember)
    local sending_key = ARGV[5] .. code_key
    local sender, code, suppressed = unpack(call('MGET', sending_key, code_key, suppressed_key))

    -- Refund only what certainly no relay accepted: neither this send, nor an earlier one of the same request.
    local doubts = tonumber(record[6]) or 0
    local accepted = result == SUCCESS
    local refused = result == 'failed' or result == INVALID_ADDRESS or result == MAIL_REJECTED
    local perhaps = doubts > 0 or result == 'unknown' or (record[7] == '1' and not refused)
    if (record[4] or '') ~= '' and not accepted and not perhaps and refusal ~= 'respelled' then
        refund(record[4], address_key)
        call('HSET', record_key, 'charged', '')
    end

    if result == 'failed' or result == 'unknown' then
        local more = result == 'unknown' and 1 or 0
        call('HSET', record_key, 'token', '', 'dot', '0', 'tries', (record[8] or 0) + 1, 'doubts', doubts + more)
    else
        call('HSET', record_key, 'token', '', 'error', result)
    end

    if refusal == 'refused' then
        suppress(suppressed_key, refusal, suppressed)
    elseif accepted and suppressed and string.match(suppressed, '^refused ') then
        call('DEL', suppressed_key)
    end

    local live = false
    if accepted and cooldown > 0 and code then
        local life = call('PTTL', code_key)
        live = life > 0 and redis.sha1hex(code) == record[5]
        if live then
            call('SET', ARGV[4] .. code_key, record[5], 'PX', math.min(cooldown, life))
        end
    end

    local wake = { 1 }
    if sender ~= string.sub(record_key, id_at) then
        return wake
    end
    call('DEL', sending_key)
    local joined_key = ARGV[6] .. code_key
    if live or result == INVALID_ADDRESS or result == MAIL_REJECTED then
        local joined = call('SMEMBERS', joined_key)
        for _, id in ipairs(joined) do
            local key = ARGV[3] .. id
            local who, error = unpack(call('HMGET', key, 'who', 'error'))
            if not who or same_version(who, record[3]) then
                call('HSET', key, 'who', record[3], 'token', '', 'error', error or result)
                call('PEXPIRE', key, remember)
            end
            wake[#wake + 1] = id
        end
        if #joined > 0 then
            call('DEL', joined_key)
        end
    else
        -- Skip those that were answered at their deadline meanwhile: they have nothing left to send.
        local id = call('SPOP', joined_key)
        while id and call('HEXISTS', ARGV[3] .. id, 'error') == 1 do
            id = call('SPOP', joined_key)
        end
        wake[2] = id or nil
    end
    return wake
end)
