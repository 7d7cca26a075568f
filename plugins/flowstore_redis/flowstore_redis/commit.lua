#!lua
-- Applies the changes of one commit: each whole or not at all, decided alone.
--
-- KEYS: the sorted set of all keys, the hash of their values, the clock.
-- ARGV: the channel, its message, the time that the changes tell (microseconds, or 0), the number of changes, and
-- for each change: before (microseconds, or empty), the numbers of expected keys, put arguments, add arguments and
-- deleted keys; then the expected keys, their versions (empty: absent), the arguments of HSET, those of ZADD, and
-- the deleted keys.
-- Returns one character for each change: 1 if it was applied, else 0.
local keys, values, clock, channel = KEYS[1], KEYS[2], KEYS[3], ARGV[1]

-- Redis keeps what a script has written before an error, so everything that can fail comes first.
for _, command in ipairs({
    {'HSET', values, 'k', 'v'}, {'HDEL', values, 'k'}, {'ZADD', keys, 0, 'k'}, {'ZREM', keys, 'k'},
    {'PUBLISH', channel, ''}, {'SET', clock, '0'},
}) do
    if not redis.acl_check_cmd(unpack(command)) then
        return redis.error_reply('NOPERM ' .. command[1])
    end
end
redis.call('ZCARD', keys)
redis.call('HLEN', values)
local time, told = redis.call('TIME'), tonumber(ARGV[3])
local stored = tonumber(redis.call('GET', clock) or 0)
local now = math.max(time[1] * 1000000 + time[2], stored, told)
if told > stored then
    redis.call('SET', clock, string.format('%.0f', told))
end

local position = 5
local function next_argument()
    position = position + 1
    return ARGV[position - 1]
end

local applied = {}
for change = 1, tonumber(ARGV[4]) do
    local before = next_argument()
    local expected, puts = tonumber(next_argument()), tonumber(next_argument())
    local adds, deletes = tonumber(next_argument()), tonumber(next_argument())
    local holds = before == '' or now < tonumber(before)
    if holds and expected > 0 then
        local found = redis.call('HMGET', values, unpack(ARGV, position, position + expected - 1))
        for number = 1, expected do
            local version = found[number] and string.sub(found[number], 1, 16) or ''
            holds = holds and version == ARGV[position + expected + number - 1]
        end
    end
    position = position + 2 * expected
    if holds then
        local put, add, delete = position, position + puts, position + puts + adds
        if puts > 0 then
            redis.call('HSET', values, unpack(ARGV, put, add - 1))
        end
        if adds > 0 then
            redis.call('ZADD', keys, unpack(ARGV, add, delete - 1))
        end
        if deletes > 0 then
            redis.call('HDEL', values, unpack(ARGV, delete, delete + deletes - 1))
            redis.call('ZREM', keys, unpack(ARGV, delete, delete + deletes - 1))
        end
    end
    position = position + puts + adds + deletes
    applied[change] = holds and '1' or '0'
end
applied = table.concat(applied)
if string.find(applied, '1') then
    redis.call('PUBLISH', channel, ARGV[2])
end
return applied
