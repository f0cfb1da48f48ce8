--[[
buckets: what issue.lua and settle.lua share. Comes between each.lua and them.

A bucket limits how many mails leave. Its key is a string: the time at which it is full again (ms). Each send moves that time by
one interval, and the bucket is empty while it is more than burst - 1 intervals away. A send is charged to all its buckets or to
none:

     1 address          bucket:<address>            the mails to one address
     2 client address   bucket:<address>:<client>   those to one address that one client asked for
     3 client           bucket:client:<client>      those that one client asked for
     4 total            bucket:total                all

A record's field `charged` says what was charged: the intervals of these four in this order (0: not charged), then the client,
separated by spaces. What is left out at the end was not charged; '' means that nothing was. So a refund is exact even if the
settings have changed since. Only of a send that fails after the bucket has become full again by itself does it give back one
too many; that takes longer than an interval, and few sends last so long.
]]
local call = redis.call

-- The key of bucket `n`. `address_key`: the key of bucket 1.
local function bucket_key(n, address_key, client)
    if n == 1 then
        return address_key
    elseif n == 2 then
        return address_key .. ':' .. client
    elseif n == 3 then
        return 'bucket:client:' .. client
    end
    return 'bucket:total'
end

-- Gives back what `charged` says. Judges by the key's remaining life, not by its value: settle.lua does not read the time.
local function refund(charged, address_key)
    local parts = {}
    for part in string.gmatch(charged, '%S+') do
        parts[#parts + 1] = part
    end
    for n = 1, math.min(#parts, 4) do
        local interval = tonumber(parts[n])
        if interval > 0 then
            local key = bucket_key(n, address_key, parts[5])
            local life = math.ceil(call('PTTL', key) - interval)
            local full = life > 0 and call('MGET', key)[1]
            if full then
                call('SET', key, full - interval, 'PX', life)
            else
                call('DEL', key)
            end
        end
    end
end
