// Rounds and moves as lists, the newest on top, with the time of each as first seen: so it does not jump about.

class Log {
  constructor(list, empty) {
    this.list = list;
    this.times = new Map();
    this.items = new Map();
    this.nothing = element("li", "empty", empty);
  }

  /** `entries` have a key, an age in seconds, and all that `write(entry, item)` writes. */
  show(entries, observedMs, write) {
    // What was tried again under the same name is told apart by how often, from the oldest on.
    const tries = new Map();
    for (const entry of entries.toReversed()) {
      const count = tries.get(entry.key) ?? 0;
      tries.set(entry.key, count + 1);
      entry.key += ` ${count}`;
    }
    const keys = new Set(entries.map((entry) => entry.key));
    for (const key of this.times.keys()) if (!keys.has(key)) this.times.delete(key);
    for (const entry of entries) {
      if (!this.times.has(entry.key)) this.times.set(entry.key, observedMs - entry.age * 1000);
      entry.atMs = this.times.get(entry.key);
    }
    const items = entries.map((entry) => this.item(entry, write));
    if (!items.length) items.push(this.nothing);
    // Only what has changed is touched: what an operator reads or marks stays.
    items.forEach((item, place) => {
      const present = this.list.children[place];
      if (present !== item) this.list.insertBefore(item, present ?? null);
    });
    while (this.list.children.length > items.length) this.list.lastChild.remove();
    this.items = new Map(entries.map((entry, place) => [entry.key, items[place]]));
  }

  /** The item of an entry: the one that is shown, if it says the same. */
  item({ age, ...entry }, write) {
    const said = JSON.stringify(entry);
    const present = this.items.get(entry.key);
    if (present?.dataset.said === said) return present;
    const item = element("li");
    item.dataset.said = said;
    item.append(element("time", "", clock(entry.atMs)));
    write(entry, item);
    present?.remove();
    return item;
  }
}

function writeRound(round, item) {
  if (!round.planned) {
    item.classList.add("quiet");
    const many = round.rounds > 1 ? `${round.rounds} rounds` : "a round";
    const why = [round.stayed, round.ignored && `instances: ${round.ignored}`].filter(Boolean).join("; ");
    item.append(`${many} by ${round.leader}: nothing to move${why ? ` (${why})` : ""}`);
    return;
  }
  const spread = `spread ${whole(round.before)} → ${whole(round.after)} tokens`;
  item.append(element("b", "", `${round.policy} moves ${round.planned}`), `, ${spread}`);
  for (const move of round.moves) {
    const line = element("span", "why");
    line.append(element("span", "id", move.id), ` ${move.source} → ${move.target}: ${move.reason}, gain ${whole(move.gain)}`);
    item.append(line);
  }
  const more = round.planned - round.moves.length;
  if (more > 0) item.append(element("span", "why", `and ${more} more`));
  if (round.stayed) item.append(element("span", "why", `stay: ${round.stayed}`));
}

/** The rounds with a key each that stays: of a round its moves, of a run of quiet ones the round before it. */
function readRounds(rounds) {
  let before = "the first";
  return rounds
    .toReversed()
    .map((round) => {
      const key = round.planned_moves ? (round.moves ?? []).map(moveKey).join() : `after ${before}`;
      before = key;
      return readRound(round, `${round.leader_term} ${key}`);
    })
    .toReversed();
}

function readRound(round, key) {
  return {
    key,
    age: seconds(round.age),
    leader: round.leader_instance_id,
    policy: words(round.policy),
    rounds: round.rounds ?? 1,
    planned: round.planned_moves ?? 0,
    before: round.spread_before_tokens ?? 0,
    after: round.spread_after_tokens ?? 0,
    stayed: counted(round.skipped_sequences),
    ignored: counted(round.skipped_instances),
    moves: (round.moves ?? []).map((move) => ({
      id: move.request_id,
      source: move.source_instance_id,
      target: move.target_instance_id,
      reason: words(move.reason, "MIGRATION_REASON_"),
      gain: move.gain_tokens ?? 0,
    })),
  };
}

function writeMove(move, item) {
  item.append(
    element("span", "id", move.id),
    ` ${move.source} → ${move.target} `,
    element("span", `outcome ${move.outcome.replaceAll(" ", "-")}`, move.outcome),
  );
  const facts = [
    move.reason || "reason not known here",
    move.tokens && `after ${plural(move.tokens, "token")}`,
    move.gap && `gap ${span(move.gap)}`,
    move.description,
  ];
  item.append(element("span", "why", facts.filter(Boolean).join(", ")));
}

function readMove(move) {
  const reason = words(move.reason, "MIGRATION_REASON_");
  return {
    key: moveKey(move),
    age: seconds(move.age),
    id: move.request_id,
    source: move.source_instance_id,
    target: move.target_instance_id,
    outcome: words(move.outcome, "MIGRATION_OUTCOME_"),
    reason: reason === "unspecified" ? "" : reason,
    tokens: move.output_tokens ?? 0,
    gap: seconds(move.gap),
    description: move.description ?? "",
  };
}
