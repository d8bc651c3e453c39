// What a frame says of the instances, reckoned up for showing.

const STALE_S = 2;
const RATE_MS = 250;

/** Output tokens per second of each instance, from one report to the next. */
class Rates {
  constructor() {
    this.last = new Map();
  }

  rate(id, atMs, tokens) {
    const last = this.last.get(id);
    if (last && atMs - last.atMs < RATE_MS && tokens >= last.tokens) return last.rate;
    const rate = last && tokens >= last.tokens ? ((tokens - last.tokens) * 1000) / (atMs - last.atMs) : undefined;
    this.last.set(id, { atMs, tokens, rate });
    return rate;
  }

  keep(ids) {
    for (const id of this.last.keys()) if (!ids.has(id)) this.last.delete(id);
  }
}

function readState(instance) {
  if (seconds(instance.report_age) > STALE_S) return "silent";
  return words(instance.state, "INSTANCE_STATE_");
}

function readInstance(instance, rates, observedMs) {
  const load = instance.load ?? {};
  const total = (load.total_blocks ?? 0) * (instance.layout?.block_tokens ?? 0);
  const used = load.total_blocks ? 1 - (load.free_blocks ?? 0) / load.total_blocks : 0;
  const atMs = observedMs - seconds(instance.report_age) * 1000;
  const resident = load.resident_tokens ?? 0;
  const predicted = Number(instance.predicted_tokens ?? 0);
  const peak = Number(instance.peak_tokens ?? 0);
  return {
    id: instance.instance_id,
    role: words(instance.role, "ROLE_"),
    state: readState(instance),
    age: seconds(instance.report_age),
    running: load.running_sequences ?? 0,
    waiting: load.waiting_sequences ?? 0,
    incoming: load.incoming_migrations ?? 0,
    outgoing: load.outgoing_migrations ?? 0,
    step: seconds(load.step_duration),
    rate: rates.rate(instance.instance_id, atMs, Number(load.output_tokens ?? 0)),
    preemptions: Number(load.preemptions ?? 0),
    holdsKv: total > 0,
    total,
    used,
    resident,
    predicted: Math.max(predicted, resident),
    peak,
    reservedPart: total ? (instance.reserved_tokens ?? 0) / total : 0,
    peakPart: total ? peak / total : 0,
    sequences: (load.sequences ?? []).map((one) => ({
      id: one.request_id,
      epoch: Number(one.epoch ?? 0),
      prompt: one.prompt_tokens ?? 0,
      output: one.output_tokens ?? 0,
      resident: one.resident_tokens ?? 0,
      limit: one.max_output_tokens ?? 0,
      remaining: one.remaining_tokens,
      upper: one.remaining_tokens_upper,
      age: one.prediction_age_tokens ?? 0,
    })),
  };
}

/** The decode instances with their sequences, each sequence where it is owned now, and the other instances. */
function readCluster(frame, rates) {
  const observedMs = Date.parse(frame.observe_time);
  const instances = frame.instances.map((one) => readInstance(one, rates, observedMs));
  rates.keep(new Set(instances.map((one) => one.id)));
  const decodes = instances.filter((one) => one.role === "decode");
  const newest = new Map();
  for (const { sequences } of decodes) {
    for (const { id, epoch } of sequences) newest.set(id, Math.max(epoch, newest.get(id) ?? 0));
  }
  for (const one of decodes) {
    // The last report of an instance may still list what goes on elsewhere.
    one.sequences = one.sequences.filter(({ id, epoch }) => epoch === newest.get(id));
  }
  return { observedMs, decodes, others: instances.filter((one) => one.role !== "decode") };
}

/** Root mean square of the distance from the mean: what rescheduling brings down. */
function spreadOf(counts) {
  const mean = counts.reduce((sum, count) => sum + count, 0) / (counts.length || 1);
  return Math.sqrt(counts.reduce((sum, count) => sum + (count - mean) ** 2, 0) / (counts.length || 1));
}

const ORDERS = {
  name: (one, other) => one.id.localeCompare(other.id, "en", { numeric: true }),
  used: (one, other) => other.used - one.used || ORDERS.name(one, other),
  peak: (one, other) => other.peakPart - one.peakPart || ORDERS.name(one, other),
};
