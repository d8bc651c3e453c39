-- Reads who leads a role. Returns the instance id and the term, or nothing. KEYS: leader.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local lease = redis.call('HMGET', KEYS[1], 'instance_id', 'term', 'expires_ms')
if not lease[1] and not lease[2] and not lease[3] then
  return false
end
local expires = tonumber(lease[3] or '')
if not lease[1] or not lease[2] or not expires then
  return redis.error_reply('INVALID leader')
end
if expires <= now then
  return false
end
return {lease[1], lease[2]}
