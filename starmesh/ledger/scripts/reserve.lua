-- Reserves tokens on an instance. Returns 'ok' or the reason of the refusal.
-- KEYS: instance, reservations. ARGV: ttl_ms, request_id, tokens, limit_tokens.
local instance = redis.call('HMGET', KEYS[1], 'state', 'block_tokens', 'free_blocks')
if not instance[1] then
  return 'not registered'
end
if instance[1] ~= 'ready' then
  return 'not ready'
end
local time = redis.call('TIME')
local now = tonumber(time[1] .. string.format('%06d', time[2]))
local tokens, free, reserved = tonumber(ARGV[3]), tonumber(ARGV[4]), 0
if instance[3] then
  local blocks, block_tokens = tonumber(instance[3]), tonumber(instance[2])
  if not blocks or not block_tokens then
    return redis.error_reply('INVALID load')
  end
  free = math.min(free, blocks * block_tokens)
end
local entries = redis.call('HGETALL', KEYS[2])
for i = 1, #entries, 2 do
  local others, expires = string.match(entries[i + 1], '^(%d+) (%d+)$')
  if not others then
    return redis.error_reply('INVALID reservation of ' .. entries[i])
  end
  if tonumber(expires) <= now then
    redis.call('HDEL', KEYS[2], entries[i])
  elseif entries[i] ~= ARGV[2] then
    reserved = reserved + tonumber(others)
  end
end
if reserved + tokens > free then
  return 'no room'
end
-- '%.0f': the default conversion of a Lua number keeps 14 digits, too few for microseconds.
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3] .. ' ' .. string.format('%.0f', now + tonumber(ARGV[1]) * 1000))
if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[1]) then
  redis.call('PEXPIRE', KEYS[2], ARGV[1])
end
return 'ok'
