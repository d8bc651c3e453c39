-- Ends a lead; the term is remembered. KEYS: leader. ARGV: instance_id, incarnation.
local lease = redis.call('HMGET', KEYS[1], 'instance_id', 'incarnation')
if lease[1] == ARGV[1] and lease[2] == ARGV[2] then
  redis.call('HSET', KEYS[1], 'expires_ms', '0')
end
return 1
