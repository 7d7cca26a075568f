#!lua flags=allow-oom
-- Reads keys, ranges and the clock, all from one state. Without the flag no-writes, a replica refuses it.
--
-- KEYS: the sorted set of all keys, the hash of their values, the clock.
-- ARGV: a time that no later answer is before (microseconds; empty: the time is not stored), the number of keys, the
-- keys, and for each range: start, end, limit (or empty), 1 if its values may be empty, 1 if it is counted.
-- Returns the time in microseconds, the values of the keys, and for each range: whether there is more, the count,
-- its keys, their values. Each value begins with its version.
local keys, values, clock = KEYS[1], KEYS[2], KEYS[3]

local function get(names, first, last)
    local found = {}
    for start = first, last, 1000 do
        local stop = math.min(start + 999, last)
        for _, value in ipairs(redis.call('HMGET', values, unpack(names, start, stop))) do
            found[#found + 1] = value
        end
    end
    return found
end

-- No time is before one that is stored, whatever happens to the machine's clock.
local time = redis.call('TIME')
local stored = tonumber(redis.call('GET', clock) or 0)
local told = math.max(time[1] * 1000000 + time[2], stored)
local least = tonumber(ARGV[1])
if least then
    told = math.max(told, least)
    -- Times within 10 ms are told as one.
    if told - stored >= 10000 or stored < least then
        redis.call('SET', clock, string.format('%.0f', told))
    else
        told = stored
    end
end

local last = 2 + tonumber(ARGV[2])
local reply = {told, get(ARGV, 3, last)}
for position = last + 1, #ARGV, 5 do
    local first, stop, limit = '[' .. ARGV[position], '(' .. ARGV[position + 1], tonumber(ARGV[position + 2])
    local names, more
    if limit then
        names = redis.call('ZRANGEBYLEX', keys, first, stop, 'LIMIT', 0, limit + 1)
        more = #names > limit
        names[limit + 1] = nil
    else
        names = redis.call('ZRANGEBYLEX', keys, first, stop)
    end
    local found = get(names, 1, #names)
    if ARGV[position + 3] == '1' then
        for number, value in ipairs(found) do
            found[number] = string.sub(value, 1, 16)
        end
    end
    local count = ARGV[position + 4] == '1' and redis.call('ZLEXCOUNT', keys, first, stop)
    reply[#reply + 1] = {more and 1 or 0, count, names, found}
end
return reply
