-- Takes or keeps the lead of a role. Returns the term, or nothing while another leads.
-- KEYS: leader. ARGV: ttl_ms, keep_ms (how long the last term is remembered), instance_id, incarnation.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local lease = redis.call('HMGET', KEYS[1], 'term', 'instance_id', 'incarnation', 'expires_ms')
local term, expires = 0, 0
if lease[1] or lease[2] or lease[3] or lease[4] then
  term, expires = tonumber(lease[1] or ''), tonumber(lease[4] or '')
  if not term or not expires then
    return redis.error_reply('INVALID leader')
  end
end
if expires > now then
  if lease[2] ~= ARGV[3] or lease[3] ~= ARGV[4] then
    return false
  end
else
  -- By the clock: a store that has lost everything must not begin below what instances have seen.
  term = math.max(term + 1, now)
end
redis.call('HSET', KEYS[1], 'term', string.format('%.0f', term), 'instance_id', ARGV[3], 'incarnation', ARGV[4],
  'expires_ms', string.format('%.0f', now + tonumber(ARGV[1])))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return string.format('%.0f', term)
