-- Stores a load, renews the registration, drops the reservations that the load includes. Returns 0 if not registered.
-- KEYS: index, instance, reservations. ARGV: ttl_ms, incarnation, free_blocks, load, request ids...
if redis.call('HGET', KEYS[2], 'incarnation') ~= ARGV[2] then
  return 0
end
local time = redis.call('TIME')
local now_us = time[1] .. string.format('%06d', time[2])
redis.call('HSET', KEYS[2], 'free_blocks', ARGV[3], 'load', ARGV[4], 'reported_at_us', now_us)
redis.call('PEXPIRE', KEYS[2], ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
for i = 5, #ARGV do
  redis.call('HDEL', KEYS[3], ARGV[i])
end
return 1
