-- Changes the state of an instance. Returns 0 if not registered.
-- KEYS: instance. ARGV: incarnation, state.
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'state', ARGV[2])
return 1
