"""What Redis does in one step, in its own language. Each script touches one key, so that any layout of slots serves."""

from __future__ import annotations

# KEYS: a rest. ARGV: until, firm until, failed at (ms of Redis' clock), channel, message. The later time holds.
REST = """
local function later(field, given)
  local kept = tonumber(redis.call('HGET', KEYS[1], field) or '0')
  local value = string.format('%d', math.max(kept, tonumber(given)))
  redis.call('HSET', KEYS[1], field, value)
  return value
end
local ends = later('until', ARGV[1])
later('firm', ARGV[2])
later('failed', ARGV[3])
redis.call('PEXPIREAT', KEYS[1], ends)
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 1
"""

# KEYS: a rest. ARGV: when the success began, channel, message. A rest that was set since knows more.
LIFT = """
if tonumber(redis.call('HGET', KEYS[1], 'failed') or '0') <= tonumber(ARGV[1]) then redis.call('DEL', KEYS[1]) end
redis.call('PUBLISH', ARGV[2], ARGV[3])
return 1
"""

# KEYS: any thing with a time to live. ARGV: value, ms, channel, message.
TELL = """
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('PUBLISH', ARGV[3], ARGV[4])
return 1
"""

# KEYS: a trial's lease. ARGV: who holds it, channel, message. Only its holder gives it back.
RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('PUBLISH', ARGV[2], ARGV[3])
return 1
"""

# KEYS: the gateways, scored by when each was last seen. ARGV: who, ms until one counts as gone. Gives how many there
# are and the time.
BEAT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {redis.call('ZCARD', KEYS[1]), now}
"""

# One gateway says what it has used of one key for one model, in absolute numbers, so that saying it twice does no harm
# and a Redis that has lost its data knows it again; and is lent more. KEYS: the account, a hash with one field for each
# gateway: `number|day|requests|tokens|lent until|lent requests|lent tokens|at:requests:tokens;…`.
# ARGV: 1 who, 2 the number of the message, 3 ms of a loan, 4 ms of the window, 5-8 limits (requests a minute and a day,
# tokens a minute and a day; -1: none), 9 its day, 10-11 used on it, 12-13 held still, 14-15 needed, 16-17 wanted
# to hold besides, 18-19 what is known to have been used today by anybody, 20 `age:requests:tokens;…` of the window.
# What was lent to one that has not come back counts as used until a window after the loan's end: it may have been. What
# is not needed comes back within 400 ms.
# Gives lent requests and tokens, used by all in the window and today, and ms until there may be room (-1: next day).
SHARE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local today = math.floor(now / 86400000)
local n = {}
for i = 2, 19 do n[i] = tonumber(ARGV[i]) end
local window = n[4]
local minute_r, minute_t, day_r, day_t, lent_r, lent_t = 0, 0, 0, 0, 0, 0
local leaving = {}
local function used(at, requests, tokens)
  if at + window <= now then return false end
  minute_r, minute_t = minute_r + requests, minute_t + tokens
  leaving[#leaving + 1] = {at + window, requests, tokens}
  return true
end
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  local number, day, r, t, ends, lr, lt, list =
    string.match(fields[i + 1], '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(.*)$')
  if fields[i] == ARGV[1] then
    if tonumber(number) >= n[2] then return {-1, 0, 0, 0, 0, 0, 0} end
  else
    local alive = false
    ends, lr, lt = tonumber(ends), tonumber(lr), tonumber(lt)
    if tonumber(day) == today then
      alive, day_r, day_t = true, day_r + r, day_t + t
    end
    if lr > 0 or lt > 0 then
      if ends > now then
        alive, lent_r, lent_t = true, lent_r + lr, lent_t + lt
        leaving[#leaving + 1] = {math.min(ends, now + 400), lr, lt}
      elseif used(ends, lr, lt) then alive = true end
    end
    for at, requests, tokens in string.gmatch(list, '(%d+):(%d+):(%d+)') do
      if used(tonumber(at), tonumber(requests), tonumber(tokens)) then alive = true end
    end
    if not alive then redis.call('HDEL', KEYS[1], fields[i]) end
  end
end
local list = {}
for age, requests, tokens in string.gmatch(ARGV[20], '(-?%d+):(%d+):(%d+)') do
  local at = now - tonumber(age)
  if used(at, tonumber(requests), tonumber(tokens)) then
    list[#list + 1] = string.format('%d:%d:%d', at, requests, tokens)
  end
end
if n[9] == today then day_r, day_t = day_r + n[10], day_t + n[11] end
day_r, day_t = math.max(day_r, n[18]), math.max(day_t, n[19])
local function left(per_minute, per_day, in_minute, in_day, lent, held)
  local room = 1e15
  if per_minute >= 0 then room = per_minute - in_minute - lent - held end
  if per_day >= 0 then room = math.min(room, per_day - in_day - lent - held) end
  return math.max(0, room)
end
local left_r = left(n[5], n[6], minute_r, day_r, lent_r, n[12])
local left_t = left(n[7], n[8], minute_t, day_t, lent_t, n[13])
local function grant(room, need, want, held)
  return math.min(room, need + math.max(0, math.min(want - held, math.floor(room / 10))))
end
local got_r, got_t = grant(left_r, n[14], n[16], n[12]), grant(left_t, n[15], n[17], n[13])
local wait = 0
if got_r < n[14] or got_t < n[15] then
  if (n[6] >= 0 and got_r < n[14] and day_r >= n[6]) or (n[8] >= 0 and got_t < n[15] and day_t + n[15] > n[8]) then
    wait = -1
  else
    table.sort(leaving, function(a, b) return a[1] < b[1] end)
    local short_r, short_t = (got_r < n[14]) and 1 or 0, n[15] - got_t
    for _, entry in ipairs(leaving) do
      wait = math.max(1, entry[1] - now)
      short_r, short_t = short_r - entry[2], short_t - entry[3]
      if short_r <= 0 and short_t <= 0 then break end
    end
  end
end
local lr, lt = n[12] + got_r, n[13] + got_t
local ends = (lr > 0 or lt > 0) and now + n[3] or 0
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d|%d|%d|%d|%d|%d|%d|%s',
  n[2], n[9], n[10], n[11], ends, lr, lt, table.concat(list, ';')))
redis.call('PEXPIRE', KEYS[1], (n[6] >= 0 or n[8] >= 0) and 172800000 or 2 * window)
return {got_r, got_t, minute_r + lent_r, minute_t + lent_t, day_r + lent_r, day_t + lent_t, wait}
"""
