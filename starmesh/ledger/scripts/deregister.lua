-- Removes an instance of this incarnation with its load and reservations.
-- KEYS: index, instance, reservations. ARGV: instance_id, incarnation.
if redis.call('HGET', KEYS[2], 'incarnation') == ARGV[2] then
  redis.call('DEL', KEYS[2], KEYS[3])
  redis.call('SREM', KEYS[1], ARGV[1])
end
return 1
