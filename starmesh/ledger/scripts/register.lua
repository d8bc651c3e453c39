-- Adds or replaces an instance.
-- KEYS: index, instance, reservations. ARGV: ttl_ms, instance_id, incarnation, state, block_tokens, info.
if redis.call('HGET', KEYS[2], 'incarnation') ~= ARGV[3] then
  redis.call('DEL', KEYS[2], KEYS[3])
end
redis.call('HSET', KEYS[2], 'incarnation', ARGV[3], 'state', ARGV[4], 'block_tokens', ARGV[5], 'info', ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
redis.call('SADD', KEYS[1], ARGV[2])
-- The index outlives the instances that it names, and no longer. (PEXPIRE GT would leave a new key without a ttl.)
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return 1
